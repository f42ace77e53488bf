"""The Dockerfile without an engine: its steps run in an empty folder that stands for ``/``, its command as its user."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from tests.conftest import ROOT
from tests.dockerfile import Instruction, Stage, read

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

OURS = ("opt", "src", "models", "var/lib/sidecar")
"""Folders of the image that our steps make; the rest of its root is the base image's."""
_ABSOLUTE = re.compile(rf"(?<![\w./-])/(?={'|'.join(OURS)})")
_UNWANTED = shutil.ignore_patterns("__pycache__", "*.onnx", "*.safetensors")


@dataclass
class Image:
    """What building the Dockerfile made."""

    root: Path
    """Stands for ``/``."""
    arguments: Mapping[str, str]
    """Build arguments, as ``--build-arg``."""
    final: Stage = field(init=False)

    def build(self) -> None:
        """Run the stages one after another, and leave what the last one copies."""
        arguments, stages = read(ROOT / "Dockerfile")
        known = {name for stage in stages for each in stage.all("ARG") for name in each.assignments}
        assert self.arguments.keys() <= known
        self._lend_python()
        variables: dict[str, str] = dict(arguments)
        for stage in stages[:-1]:
            for each in stage.instructions:
                self._follow(each, variables)
        self.final = stages[-1]
        kept = [self.inside(each.value.split()[-1]) for each in self.final.all("COPY")]
        for name in OURS:
            folder = self.root / name
            if folder.exists() and folder not in {path if path == folder else path.parent for path in kept}:
                shutil.rmtree(folder)
        self.inside(self.final.only("WORKDIR").value).mkdir(parents=True)
        if os.geteuid() == 0:
            self._hand_over()

    @property
    def owned(self) -> list[Path]:
        """What the last stage gives to the image's user: copies with ``--chown``, and the home that is made for it."""
        user = self.final.only("USER").value
        copies = [each.value.split()[-1] for each in self.final.all("COPY") if f"--chown={user} " in each.value]
        made = [each.value for each in self.final.all("RUN") if "--create-home" in each.value]
        return [self.inside(path) for path in (*copies, *re.findall(r"--home-dir (\S+)", " ".join(made)))]

    def paths(self) -> list[Path]:
        """Every file and folder of the image that our steps made."""
        folders = [self.root / name for name in OURS]
        return [path for folder in folders if folder.exists() for path in (folder, *folder.rglob("*"))]

    @contextmanager
    def read_only(self) -> Iterator[None]:
        """Take its user's right to write, as ``--read-only`` does."""
        modes = {path: path.stat().st_mode for path in self.paths() if not path.is_symlink()}
        for path, mode in modes.items():
            path.chmod(mode & ~0o222)
        try:
            yield
        finally:
            for path, mode in modes.items():
                path.chmod(mode)

    def inside(self, path: str) -> Path:
        """Where an absolute path of the image lies."""
        return self.root / path.lstrip("/")

    def environment(self, **more: str) -> dict[str, str]:
        """The final stage's variables, and nothing else of this process."""
        ours = {name: self._translated(value) for name, value in self.final.only("ENV").assignments.items()}
        path = ours["PATH"].replace("$PATH", f"{self.root / 'base' / 'bin'}:/usr/bin:/bin")
        return {**ours, "PATH": path, **self._loader(), "HOME": str(self.inside("/var/lib/sidecar")), **more}

    @property
    def user(self) -> dict[str, object]:
        """Arguments of ``subprocess`` that run a process as the image's user; none where we are nobody special."""
        if os.geteuid() != 0:
            return {}
        user, group = map(int, self.final.only("USER").value.split(":"))
        return {"user": user, "group": group, "extra_groups": []}

    def run(self, words: Sequence[str], **more: str) -> subprocess.CompletedProcess[str]:
        """Run a command of the image to its end, as its user, in its working directory."""
        where = self.inside(self.final.only("WORKDIR").value)
        return subprocess.run(  # type: ignore[call-overload,no-any-return]  # the user's arguments are of three types
            words, cwd=where, env=self.environment(**more), capture_output=True, text=True, check=False,
            executable=shutil.which(words[0], path=self.environment()["PATH"]), **self.user,
        )  # fmt: skip

    def files(self) -> dict[str, int]:
        """When each file of the image was last changed, in nanoseconds."""
        return {str(path): path.lstat().st_mtime_ns for path in self.paths()}

    def _hand_over(self) -> None:
        """Let root and the image's user own what each owns there."""
        user, group = map(int, self.final.only("USER").value.split(":"))
        for path in self.paths():
            ours = any(path.is_relative_to(folder) for folder in self.owned)
            os.lchown(path, *((user, group) if ours else (0, 0)))

    def _follow(self, each: Instruction, variables: dict[str, str]) -> None:
        if each.word == "ARG":
            variables |= {name: self.arguments.get(name, default) for name, default in each.assignments.items()}
        elif each.word == "ENV":
            variables |= each.assignments
        elif each.word == "WORKDIR":
            variables["PWD"] = each.value
            self.inside(each.value).mkdir(parents=True)
        elif each.word == "COPY":
            *sources, target = each.value.split()
            for source in sources:
                self._copy(source, self.inside(variables["PWD"]) / target)
        elif each.word == "RUN":
            self._execute(re.sub(r"--mount=\S+\s*", "", each.value), variables)
        else:
            raise AssertionError(f"this test does not know {each.word}")

    def _copy(self, source: str, target: Path) -> None:
        path = ROOT / source
        if path.is_dir():
            shutil.copytree(path, target, ignore=_UNWANTED)
        else:
            shutil.copy(path, target)

    def _execute(self, script: str, variables: Mapping[str, str]) -> None:
        kept = {name: value for name, value in os.environ.items() if name.startswith(("PIP_", "UV_", "HOME", "SSL_"))}
        own = {name: value for name, value in variables.items() if name not in {"PWD", "PIP_CACHE_DIR"}}
        environment = kept | own | self._loader() | {"PATH": f"{self.root / 'base' / 'bin'}:/usr/bin:/bin"}
        done = subprocess.run(
            ["/bin/sh", "-c", self._translated(script)],
            cwd=self.inside(variables["PWD"]), env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{script}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"

    def _translated(self, text: str) -> str:
        return _ABSOLUTE.sub(f"{self.root}/", text)

    def _lend_python(self) -> None:
        """Put ``python`` where the base image would have one: ours, copied where its user could not read it."""
        program, base = Path(sys.executable).resolve(), Path(sys.base_prefix)
        home = self.root / "base"
        (home / "bin").mkdir(parents=True)
        if all(parent.stat().st_mode & stat.S_IXOTH for parent in program.parents):
            (home / "bin" / "python").symlink_to(program)
            return
        library = f"lib/python{sys.version_info.major}.{sys.version_info.minor}"
        unwanted = shutil.ignore_patterns("site-packages", "test", "config-*", "__pycache__", "idlelib", "tkinter")
        shutil.copytree(base / library, home / library, ignore=unwanted)
        shutil.copy(program, home / "bin" / "python")
        for file in base.glob("lib/libpython*.so*"):
            shutil.copy(file, home / "lib")

    def _loader(self) -> dict[str, str]:
        library = self.root / "base" / "lib"
        return {"LD_LIBRARY_PATH": str(library)} if library.exists() else {}
