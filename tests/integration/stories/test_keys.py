"""Sources of every shape: keys of many types, odd names, several content columns, several pipelines."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.integration.stories.story import World

pytestmark = pytest.mark.asyncio(loop_scope="package")

ODD_KEYS = [
    "plain",
    "it's",
    'say "hi"',
    "two  spaces ",
    " ",
    "",
    "a/b\\c",
    "naïve-日本-🙂",
    "{1,2}",
    "NULL",
    "%s $1",
    "x" * 500,
]


async def test_bigint_keys_up_to_the_last(world: World) -> None:
    await world.sql("CREATE TABLE numbered (id bigint PRIMARY KEY, body text)")
    story = await world.attach("numbered", "body")
    keys = [-9223372036854775808, -1, 0, 9223372036854775807]
    for key in keys:
        await world.pool.execute("INSERT INTO numbered VALUES ($1, $2)", key, f"text of {key}")
    for key in keys:
        await story.holds(key, f"text of {key}")
    await story.dead(0)


async def test_text_keys_of_any_kind(world: World) -> None:
    await world.sql("CREATE TABLE worded (id text PRIMARY KEY, body text)")
    story = await world.attach("worded", "body")
    await world.pool.executemany("INSERT INTO worded VALUES ($1, $2)", [(key, f"text of {key}") for key in ODD_KEYS])
    for key in ODD_KEYS:
        await story.holds(key, f"text of {key}")
    await world.sql("UPDATE worded SET body = 'changed: ' || id")
    for key in ODD_KEYS:
        await story.holds(key, f"changed: {key}")
    await story.dead(0)


async def test_uuid_keys(world: World) -> None:
    await world.sql("CREATE TABLE unique_ones (id uuid PRIMARY KEY DEFAULT gen_random_uuid(), body text)")
    story = await world.attach("unique_ones", "body")
    key = await world.pool.fetchval("INSERT INTO unique_ones (body) VALUES ('by uuid') RETURNING id")
    await story.holds(key, "by uuid")
    await story.send(f'{{"document_id": "{{{str(key).upper()}}}"}}')  # another spelling of the same key
    await story.quiet()
    assert await story.outcomes("unchanged") == 1
    await story.dead(0)


async def test_dates_that_the_writer_spells_another_way(world: World) -> None:
    await world.sql("CREATE TABLE diary (day date PRIMARY KEY, body text, written timestamptz)")
    story = await world.attach("diary", "body", "written")
    async with world.pool.acquire() as writer, writer.transaction():
        await writer.execute("SET LOCAL datestyle = 'German'")
        await writer.execute("SET LOCAL timezone = 'Asia/Tokyo'")
        await writer.execute("INSERT INTO diary VALUES ('2024-02-01', 'first of February', '2024-02-01 12:00+00')")
    await story.holds("2024-02-01", "first of February\n\n2024-02-01 12:00:00+00")
    await story.quiet()
    async with world.pool.acquire() as writer, writer.transaction():
        await writer.execute("SET LOCAL datestyle = 'SQL, DMY'")
        await writer.execute("UPDATE diary SET written = written")
        await writer.execute("UPDATE diary SET body = 'changed' WHERE day = '1/2/2024'")
    await story.holds("2024-02-01", "changed\n\n2024-02-01 12:00:00+00")
    await story.quiet()
    assert await story.metric("sidecar_leased_messages_total") == 2
    await story.dead(0)


async def test_a_foreign_key_too_long_for_its_type_names_no_document(world: World) -> None:
    await world.sql("CREATE TABLE short (code varchar(8) PRIMARY KEY, body text)")
    story = await world.attach("short", "body")
    await world.sql("INSERT INTO short VALUES ('abcdefgh', 'as it was')")
    await story.holds("abcdefgh", "as it was")
    await world.sql(
        "ALTER TABLE short DISABLE TRIGGER USER",
        "UPDATE short SET body = 'unseen'",
        "ALTER TABLE short ENABLE TRIGGER USER",
    )
    await story.send('{"document_id": "abcdefghi"}')
    await story.quiet()
    assert await story.outcomes("gone") == 1
    await story.holds("abcdefgh", "as it was")  # cut to eight characters the message would have named this one
    await story.dead(0)


async def test_a_quoted_table_with_two_content_columns(world: World) -> None:
    await world.sql(
        'CREATE SCHEMA "My App"',
        'CREATE TABLE "My App"."Help Articles" ("Article Id" int PRIMARY KEY, "Title" text, "BODY" varchar, "n°" int)',
    )
    story = await world.attach('"My App"."Help Articles"', "Title", "BODY", name="help")
    await world.sql(
        """INSERT INTO "My App"."Help Articles" VALUES (1, 'Reset', 'Press the knob.', 1), (2, 'Alone', NULL, 2)"""
    )
    await story.holds(1, "Reset\n\nPress the knob.")
    await story.holds(2, "Alone")
    await world.sql("""UPDATE "My App"."Help Articles" SET "BODY" = 'Turn it off.' WHERE "Article Id" = 2""")
    await story.holds(2, "Alone\n\nTurn it off.")
    await world.sql("""UPDATE "My App"."Help Articles" SET "Title" = NULL, "BODY" = NULL WHERE "Article Id" = 1""")
    await story.forgets(1)
    await world.sql("""DELETE FROM "My App"."Help Articles" WHERE "Article Id" = 2""")
    await story.forgets(2)
    await story.dead(0)


async def test_two_pipelines_on_one_source(world: World) -> None:
    await world.sql("CREATE TABLE shared (id bigint PRIMARY KEY, title text, body text)")
    titles = await world.attach("shared", "title", name="shared_titles")
    bodies = await world.attach("shared", "body", name="shared_bodies", long_documents="chunks")
    body = "a long body of many words " * 40
    await world.pool.execute("INSERT INTO shared VALUES (1, 'a title', $1)", body)
    await titles.holds(1, "a title")
    await bodies.holds(1, body)
    await titles.quiet()
    await bodies.quiet()
    await world.sql("UPDATE shared SET title = 'another title'")
    await titles.holds(1, "another title")
    await titles.quiet()
    assert (await titles.embeds(), await bodies.metric("sidecar_leased_messages_total")) == (2, 1)
    await world.sql("DELETE FROM shared")
    await titles.forgets(1)
    await bodies.forgets(1)
