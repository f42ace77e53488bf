"use strict";
// Asks /overview every two seconds and shows it. Everything from outside becomes text, never markup.

const EVERY = 2000, PATIENCE = 5000, OLD = 15, STEPS = 180;
const SVG = "http://www.w3.org/2000/svg";
const NONE = "–";

const byId = (id) => document.getElementById(id);
const part = (root, name) => root.querySelector(`[data-at="${name}"]`);

// Writing only what changed keeps the reader's selection, and keeps the live region quiet.
function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

function tone(element, name) {
  if (name) element.dataset.tone = name;
  else delete element.dataset.tone;
}

function show(element, visible) {
  if (element.hidden === visible) element.hidden = !visible;
}

function make(tag, className, text) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}

function draw(tag, attributes) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
}

// As many rows as there are values; what stands there already is written anew.
function rows(parent, values, create, write) {
  while (parent.children.length > values.length) parent.lastElementChild.remove();
  values.forEach((value, at) => write(parent.children[at] || parent.appendChild(create()), value));
}

// How things are said

const whole = new Intl.NumberFormat("en");
const count = (number) => (number === null || number === undefined ? NONE : whole.format(number));
const plural = (number, word) => `${count(number)} ${word}${number === 1 ? "" : "s"}`;

function rate(perSecond) {
  if (perSecond === 0) return "0/s";
  return perSecond < 0.1 ? `${(perSecond * 60).toFixed(1)}/min` : `${perSecond.toFixed(perSecond < 10 ? 1 : 0)}/s`;
}

function span(seconds) {
  if (seconds === null || seconds === undefined) return NONE;
  if (seconds < 0.9995) return `${Math.max(1, Math.round(seconds * 1000))} ms`;
  if (seconds < 9.95) return `${seconds.toFixed(1)} s`;
  const all = Math.round(seconds);
  if (all < 120) return `${all} s`;
  const [days, hours, minutes] = [Math.floor(all / 86400), Math.floor(all / 3600) % 24, Math.floor(all / 60) % 60];
  if (days) return `${days} d ${hours} h`;
  return hours ? `${hours} h ${minutes} min` : `${minutes} min`;
}

const ago = (seconds) => (seconds < 1.5 ? "just now" : `${span(Math.round(seconds))} ago`);

function share(part) {
  if (part === null) return NONE;
  if (part === 1) return "100 %";
  return `${(Math.floor(part * 1000) / 10).toFixed(1)} %`; // never rounded up: 100 % is a promise
}

// Charts: STEPS wide, 100 high, newest on the right

const clamp = (value, low, high) => Math.min(high, Math.max(low, value));
const roundUp = (value) => {
  const decade = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].map((step) => step * decade).find((bound) => bound >= value * 0.999);
};
const largest = (values) => values.reduce((most, value) => (value === null ? most : Math.max(most, value)), 0);

// Neighbours that are known are joined; one that stands alone is a dot.
function line(values, y) {
  const from = STEPS - values.length;
  let path = "", open = false;
  values.forEach((value, at) => {
    if (value === null) return void (open = false);
    path += `${open ? "L" : "M"}${from + at + 0.5},${y(value).toFixed(1)}${open ? "" : "h0.01"}`;
    open = true;
  });
  return path;
}

function area(values, y) {
  const from = STEPS - values.length;
  let path = "", last = null;
  values.forEach((value, at) => {
    const x = from + at + 0.5;
    if (value !== null) path += `${last === null ? `M${x},100V` : `L${x},`}${y(value).toFixed(1)}`;
    if (value === null && last !== null) path += `V100Z`;
    last = value;
  });
  return last === null ? path : `${path}V100Z`;
}

function bars(values, y) {
  const from = STEPS - values.length;
  return values.map((value, at) => (value ? `M${from + at + 0.1},100V${Math.min(y(value), 98).toFixed(1)}h0.8V100Z` : "")).join("");
}

const BOUNDS = [0.0001, 0.001, 0.01, 0.1, 1, 10, 60, 600, 3600, 36000, 86400, 864000]; // seconds, each a round figure
const round = (seconds) => span(seconds).replace(/\.0(?= s)| 0 (min|h)$/, "");
const linear = (most) => (value) => 100 - (100 * value) / most;
const logarithmic = (least, most) => (value) => 100 - (100 * Math.log(clamp(value, least, most) / least)) / Math.log(most / least);

const CHARTS = {
  embedded: {
    label: "Embedded",
    view(series, step) {
      const values = series.embedded.map((number) => number / step);
      const most = roundUp(Math.max(1, largest(values)));
      return {
        paths: [["bars", bars(values, linear(most))]],
        scale: [rate(most), ""],
        at: (index) => rate(values[index]),
        spoken: (pipeline) => `now ${rate(pipeline.rate)}, at most ${rate(largest(values))} in one step of ${step} seconds`,
      };
    },
    now: (pipeline) => [["", rate(pipeline.rate), "last minute"]],
  },
  depth: {
    label: "Queued",
    view(series) {
      const most = roundUp(Math.max(10, largest(series.depth)));
      const y = linear(most);
      const latest = series.depth[series.depth.length - 1];
      return {
        paths: [["area", area(series.depth, y)], ["first", line(series.depth, y)]],
        scale: [count(most), ""],
        at: (index) => (series.depth[index] === null ? "not known" : plural(series.depth[index], "message")),
        spoken: () => `now ${latest === null ? "not known" : plural(latest, "message")}, at most ${count(largest(series.depth))}`,
      };
    },
    now: (pipeline, known) => [["", known ? count(pipeline.queue.live.depth + pipeline.queue.bulk.depth) : NONE, "messages"]],
  },
  freshness: {
    label: "Freshness",
    view(series) {
      const known = [...series.freshness_p50, ...series.freshness_p99].filter((value) => value !== null);
      const [low, high] = known.length ? [Math.min(...known), Math.max(...known)] : [1, 1];
      const least = BOUNDS.findLast((bound) => bound < low) || BOUNDS[0];
      const most = BOUNDS.find((bound) => bound > high) || BOUNDS[BOUNDS.length - 1];
      const y = logarithmic(least, most);
      return {
        paths: [["second", line(series.freshness_p99, y)], ["first", line(series.freshness_p50, y)]],
        scale: known.length ? [round(most), round(least)] : ["", ""],
        at: (index) => (series.freshness_p50[index] === null ? "nothing embedded"
          : `p50 ${span(series.freshness_p50[index])}, p99 ${span(series.freshness_p99[index])}`),
        spoken: ({ freshness }) => (freshness.count === 0 ? "nothing was embedded"
          : `half of ${plural(freshness.count, "document")} within ${span(freshness.p50)}, 99 of 100 within ${span(freshness.p99)}, logarithmic scale`),
      };
    },
    now: ({ freshness }) => (freshness.count === 0 ? [["", NONE, "nothing embedded"]]
      : [["key", span(freshness.p50), "p50"], ["key second", span(freshness.p99), "p99"]]),
  },
};

class Chart {
  constructor(figure) {
    this.kind = CHARTS[figure.dataset.chart];
    this.from = null; // steps before now that the pointer is at
    const caption = make("figcaption");
    caption.append(make("span", "label", this.kind.label), (this.now = make("span", "now")));
    this.svg = draw("svg", { viewBox: `0 0 ${STEPS} 100`, preserveAspectRatio: "none", role: "img" });
    this.svg.append(draw("line", { class: "middle", x1: 0, x2: STEPS, y1: 50, y2: 50 }));
    this.cursor = draw("line", { class: "cursor", y1: 0, y2: 100, visibility: "hidden" });
    this.most = make("span", "scale most");
    this.least = make("span", "scale least");
    const plot = make("div", "plot");
    plot.append(this.svg, this.most, this.least);
    const axis = make("div", "axis");
    axis.setAttribute("aria-hidden", "true");
    axis.append(make("span", "", "15 min ago"), (this.pointed = make("span", "at")), make("span", "", "now"));
    figure.append(caption, plot, axis);
    this.svg.addEventListener("pointermove", (event) => this.point(event));
    this.svg.addEventListener("pointerleave", () => this.point(null));
  }

  update(pipeline, series, step, known) {
    const view = (this.view = this.kind.view(series, step));
    [this.length, this.step] = [series.embedded.length, step];
    rows(this.now, this.kind.now(pipeline, known), () => make("span"), (element, [key, value, unit]) => {
      if (!element.firstChild) element.append(make("span"), make("span"), " ", make("small"), " ");
      element.firstChild.className = key;
      say(element.children[1], value);
      say(element.children[2], unit);
    });
    view.paths.forEach(([className, path], at) => {
      this.svg.querySelector(`.${className}`) || this.svg.append(draw("path", { class: className }));
      this.svg.querySelector(`.${className}`).setAttribute("d", path);
    });
    this.svg.append(this.cursor);
    say(this.most, view.scale[0]);
    say(this.least, view.scale[1]);
    this.svg.setAttribute("aria-label", `${this.kind.label} in the last 15 minutes: ${view.spoken(pipeline)}.`);
    this.tell();
  }

  point(event) {
    const box = this.svg.getBoundingClientRect();
    this.from = event && Math.floor((1 - (event.clientX - box.left) / box.width) * STEPS);
    this.tell();
  }

  // What stands under the pointer: steps are counted back from now, so that it stays true while time goes on.
  tell() {
    const index = this.length - 1 - this.from;
    const there = this.from !== null && index >= 0 && index < this.length;
    this.cursor.setAttribute("visibility", there ? "visible" : "hidden");
    this.cursor.setAttribute("transform", `translate(${there ? STEPS - this.from - 0.5 : 0})`);
    say(this.pointed, there ? `${ago(this.from * this.step)}: ${this.view.at(index)}` : "");
  }
}

// One pipeline

const STATES = { working: "good", paused: "quiet", refused: "bad", waiting: "warn" };
const CIRCUITS = { closed: "", half_open: "warn", open: "bad" };
const OUTCOMES = ["embedded", "unchanged", "superseded", "gone", "blank", "deferred", "released", "dead_lettered"];
const cards = new Map();

function card(name) {
  if (cards.has(name)) return cards.get(name);
  const section = byId("card").content.cloneNode(true).firstElementChild;
  const title = part(section, "name");
  section.id = `pipeline-${name}`;
  title.id = `title-${name}`;
  title.textContent = name;
  section.setAttribute("aria-labelledby", title.id);
  const made = { section, charts: new Map() };
  for (const figure of section.querySelectorAll("[data-chart]")) made.charts.set(figure.dataset.chart, new Chart(figure));
  cards.set(name, made);
  return made;
}

function showCard(pipeline, series, step, known, told) {
  const { section, charts } = card(pipeline.name);
  const put = (name, text) => say(part(section, name), text);
  put("source", pipeline.source);
  put("model", pipeline.model);
  put("state", pipeline.state);
  tone(part(section, "state"), STATES[pipeline.state]);
  put("circuit", `circuit ${pipeline.circuit.replace("_", " ")}`);
  tone(part(section, "circuit"), CIRCUITS[pipeline.circuit]);
  const paused = `Messages wait until it is resumed: sidecar-daemon resume ${pipeline.name}`;
  const reason = pipeline.state === "paused" ? paused : told.includes(pipeline.reason) ? "" : pipeline.reason;
  put("reason", reason || "");
  tone(part(section, "reason"), pipeline.state === "paused" ? "quiet" : STATES[pipeline.state]);
  show(part(section, "reason"), Boolean(reason));
  for (const chart of charts.values()) chart.update(pipeline, series, step, known);
  for (const lane of ["live", "bulk"]) {
    const { depth, in_flight, oldest_seconds } = pipeline.queue[lane];
    put(`${lane}-depth`, known ? count(depth) : NONE);
    put(`${lane}-in-flight`, known ? count(in_flight) : NONE);
    put(`${lane}-oldest`, known && depth ? span(oldest_seconds) : NONE);
  }
  put("coverage", share(pipeline.coverage));
  put("documents", count(pipeline.documents));
  put("sweep", sweep(pipeline.sweep));
  const bar = part(section, "bar");
  bar.style.width = `${100 * (pipeline.coverage || 0)}%`;
  showOutcomes(section, pipeline.outcomes);
  showLetters(section, pipeline, known);
}

function sweep({ walking, scanned, age_seconds }) {
  if (walking) return `walking, ${plural(scanned, "row")}`;
  return age_seconds === null ? NONE : `finished ${ago(age_seconds)}`;
}

function showOutcomes(section, outcomes) {
  const seen = OUTCOMES.filter((name) => outcomes[name] || name === "embedded");
  rows(part(section, "outcomes"), seen, pair, (element, name) => {
    say(element.firstChild, name.replace("_", "-"));
    say(element.lastChild, count(outcomes[name] || 0));
    tone(element.lastChild, name === "dead_lettered" && "bad");
  });
}

function pair() {
  const element = make("div");
  element.append(make("dt"), make("dd"));
  return element;
}

function showLetters(section, { name, queue, dead_letters: letters }, known) {
  const dead = part(section, "dead");
  say(dead, known && queue.dead ? count(queue.dead) : "");
  tone(dead, queue.dead && "bad");
  say(part(section, "no-letters"), known ? (queue.dead ? "Not looked at yet." : "None.") : NONE);
  show(part(section, "no-letters"), !letters.length);
  show(part(section, "letters"), letters.length > 0);
  show(part(section, "hint"), letters.length > 0);
  say(part(section, "command"), `sidecar-daemon dead-letters list ${name}`);
  rows(part(section, "letter-rows"), letters, letterRow, (row, letter) => {
    say(row.children[0].firstChild, letter.key ?? "none");
    say(row.children[1], letter.reason ?? "unknown");
    say(row.children[2], span(letter.age_seconds));
    say(row.children[3], count(letter.attempts));
  });
}

function letterRow() {
  const row = make("tr");
  const key = make("th", "text");
  key.scope = "row";
  key.append(make("code"));
  row.append(key, make("td", "text reason"), make("td"), make("td", "roomy"));
  return row;
}

function showRow(row, pipeline, known) {
  const put = (name, text) => say(part(row, name), text);
  const link = part(row, "name");
  say(link, pipeline.name);
  link.href = `#pipeline-${pipeline.name}`;
  put("state", pipeline.state);
  tone(part(row, "state"), STATES[pipeline.state]);
  put("queued", known ? count(pipeline.queue.live.depth + pipeline.queue.bulk.depth) : NONE);
  put("rate", rate(pipeline.rate));
  put("p50", span(pipeline.freshness.p50));
  put("p99", span(pipeline.freshness.p99));
  put("coverage", share(pipeline.coverage));
  put("dead", known ? count(pipeline.queue.dead) : NONE);
  tone(part(row, "dead"), known && pipeline.queue.dead && "bad");
}

// The whole daemon

let last = null; // { overview, at }: the newest answer
let failed = false, held = false, timer = null, asking = false;

function render() {
  const { overview } = last;
  const known = overview.observed_seconds_ago !== null;
  const { pipelines, history } = overview;
  say(byId("version"), overview.version);
  say(byId("database"), overview.database);
  say(byId("uptime"), `up ${span(overview.uptime_seconds)}`);
  rows(byId("rows"), pipelines, () => byId("row").content.cloneNode(true).firstElementChild,
    (row, pipeline) => showRow(row, pipeline, known));
  show(byId("all"), pipelines.length > 1);
  show(byId("nothing"), pipelines.length === 0 && known);
  for (const pipeline of pipelines) {
    showCard(pipeline, history.series[pipeline.name], history.step_seconds, known, overview.reasons);
  }
  for (const [name, { section }] of cards) {
    if (!pipelines.some((pipeline) => pipeline.name === name)) {
      section.remove();
      cards.delete(name);
    }
  }
  pipelines.forEach(({ name }, at) => {
    const wanted = card(name).section, there = byId("cards").children[at];
    if (there !== wanted) byId("cards").insertBefore(wanted, there || null);
  });
  say(byId("summary"), summary(overview));
}

function summary({ pipelines, reasons }) {
  const paused = pipelines.filter(({ state }) => state === "paused").length;
  const dead = pipelines.reduce((sum, { queue }) => sum + queue.dead, 0);
  const parts = [];
  if (paused) parts.push(`${plural(paused, "pipeline")} paused`);
  if (dead) parts.push(`${plural(dead, "dead letter")} waiting for a person`);
  return parts.join(" · ");
}

// The verdict is a live region: it changes when the state does, not every two seconds.
function verdict() {
  const overview = last && last.overview;
  const [headline, colour, reasons] = failed
    ? ["The daemon does not answer", "bad", last ? ["What you see is its last answer."] : []]
    : !overview ? ["Asking the daemon …", "quiet", []]
    : overview.ready ? ["Ready", "good", []]
    : ["Not ready", "bad", once(overview.reasons)];
  say(byId("headline"), headline);
  tone(byId("verdict"), colour);
  rows(byId("reasons"), reasons, () => make("li"), say);
  show(byId("reasons"), reasons.length > 0);
  const title = `${headline} · sidecar-daemon`;
  if (document.title !== title) {
    document.title = title;
    const fill = { good: "%230b6b3a", bad: "%23c8281f", quiet: "%23808890" }[colour];
    byId("icon").href = `data:image/svg+xml,<svg xmlns="${SVG}" viewBox="0 0 16 16"><circle cx="8" cy="8" r="7" fill="${fill}"/></svg>`;
  }
}

// What is said of the whole daemon is not said again of each pipeline.
const once = (reasons) => reasons.filter((reason) => !reasons.some((other) => reason.endsWith(`: ${other}`)));

function age() {
  if (!last) return;
  const passed = (performance.now() - last.at) / 1000;
  const seen = last.overview.observed_seconds_ago;
  const queues = seen === null ? "queues not looked at yet"
    : seen + passed > OLD ? `queues as of ${ago(seen + passed)}` : "";
  tone(byId("age"), (failed || queues) && "warn");
  say(byId("age"), [held || failed || passed > 5 ? `shown: state of ${ago(passed)}` : "updated every 2 s", queues].filter(Boolean).join(" · "));
}

async function ask() {
  if (asking || held || document.hidden) return;
  asking = true;
  clearTimeout(timer);
  try {
    last = { overview: await answer(), at: performance.now() };
    failed = false;
  } catch {
    failed = true;
  }
  try {
    if (!failed) render();
    verdict();
    age();
  } finally {
    asking = false;
    timer = setTimeout(ask, EVERY);
  }
}

async function answer() {
  const response = await fetch("overview", { cache: "no-store", signal: AbortSignal.timeout(PATIENCE) });
  if (!response.ok) throw new Error(String(response.status));
  return response.json();
}

byId("hold").addEventListener("click", () => {
  held = !held;
  say(byId("hold"), held ? "Resume updates" : "Hold updates");
  ask();
  age();
});
document.addEventListener("visibilitychange", ask);
setInterval(age, 1000);
ask();
