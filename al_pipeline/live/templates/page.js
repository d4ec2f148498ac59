"use strict";
// Shows the states that /events sends. All that comes from outside is set as text.
const $ = (id) => document.getElementById(id);
const query = "?token=" + encodeURIComponent(new URLSearchParams(location.search).get("token") || "");
const SPEAK_MS = 30000; // a screen reader is told a sentence at most so often
let state = null, connected = false, paused = false, spoken = "", spokenAt = -SPEAK_MS;

const count = (number, noun) => `${number.toLocaleString("en")} ${noun}${number === 1 ? "" : "s"}`;
const fixed = (value, digits) => (value === null || value === undefined ? "–" : value.toFixed(digits));
const percent = (value) => (value === null || value === undefined ? "–" : (100 * value).toFixed(1) + " %");
const span = (one) => (one.low === null || one.high === null ? "" : `${percent(one.low)} to ${percent(one.high)}`);
const ago = (s) => (s < 90 ? `${Math.round(s)} s` : s < 5400 ? `${Math.round(s / 60)} min` : `${Math.round(s / 3600)} h`);

function make(kind, text, names) {
  const made = document.createElement(kind);
  if (text !== undefined && text !== null) made.textContent = text;
  if (names) made.className = names;
  return made;
}

function fill(id, caption, header, rows) { // rows: cells as text, numbers as {n: text}, or elements
  const table = make("table"), head = table.createTHead().insertRow(), body = table.createTBody();
  table.createCaption().textContent = rows.length ? caption : "Nothing yet.";
  if (rows.length) header.forEach((name) => { head.append(make("th", name)); head.lastChild.scope = "col"; });
  rows.forEach((row) => {
    const line = body.insertRow();
    row.forEach((cell, place) => {
      const made = make(place ? "td" : "th", null, cell && cell.n !== undefined ? "n" : "");
      if (!place) made.scope = "row";
      const shown = cell instanceof Element ? cell : make("bdi", cell && cell.n !== undefined ? cell.n : cell);
      made.append(shown);
      line.append(made);
    });
  });
  if ($(id).innerHTML !== table.innerHTML) $(id).replaceChildren(...table.childNodes);
}

function tiles(rows) {
  $("now").replaceChildren(...rows.map(([name, value, note]) => {
    const tile = make("div"), figure = make("dd", value);
    if (note) figure.append(make("small", note));
    tile.append(make("dt", name), figure);
    return tile;
  }));
}

function draw(points) {
  const svg = $("curve"), W = 640, H = 260, L = 46, R = 12, T = 12, B = 34;
  const add = (kind, values, text) => {
    const made = document.createElementNS("http://www.w3.org/2000/svg", kind);
    Object.entries(values).forEach(([name, value]) => made.setAttribute(name, value));
    if (text !== undefined) made.textContent = text;
    svg.append(made);
  };
  svg.replaceChildren();
  if (!points.length) return;
  const low = Math.min(...points.map((p) => p.low ?? p.value)), high = Math.max(...points.map((p) => p.high ?? p.value));
  const floor = Math.floor(low * 20) / 20, top = Math.max(Math.ceil(high * 20) / 20, floor + 0.05);
  const most = Math.max(...points.map((p) => p.labels)), least = Math.min(...points.map((p) => p.labels));
  const x = (n) => L + ((n - least) / Math.max(1, most - least)) * (W - L - R);
  const y = (v) => T + ((top - v) / (top - floor)) * (H - T - B);
  for (let i = 0; i <= 4; i++) {
    const value = floor + (i * (top - floor)) / 4;
    add("line", { class: "axis", x1: L, x2: W - R, y1: y(value), y2: y(value) });
    add("text", { x: L - 6, y: y(value) + 4, "text-anchor": "end" }, (100 * value).toFixed(0) + " %");
  }
  add("text", { x: L, y: H - 12 }, `${least.toLocaleString("en")} labels`);
  add("text", { x: W - R, y: H - 12, "text-anchor": "end" }, `${most.toLocaleString("en")} labels`);
  for (const [what, name] of [["test accuracy", "test"], ["running accuracy", "running"]]) {
    const own = points.filter((p) => p.what === what), bound = own.filter((p) => p.low !== null && p.high !== null);
    const at = (p, value) => `${x(p.labels).toFixed(1)},${y(value).toFixed(1)}`;
    const edge = [...bound.map((p) => at(p, p.high)), ...bound.reverse().map((p) => at(p, p.low))];
    if (edge.length > 2) add("polygon", { class: `band ${name}band`, points: edge.join(" ") });
    if (own.length > 1) add("polyline", { class: name, points: own.map((p) => at(p, p.value)).join(" ") });
    const dots = name === "test" ? own : own.slice(-1);
    dots.forEach((p) => add("circle", { class: `${name}dot`, cx: x(p.labels), cy: y(p.value), r: 3.5 }));
  }
}

function show() {
  const s = state, r = s.running, atWork = s.people.filter((one) => one.at_work).length;
  document.title = `${s.workspace}: ${s.labels} labels, live`;
  $("workspace").textContent = s.workspace;
  $("health").textContent = s.health === "up" ? s.waits_for : s.health;
  if (s.label_studio_page && /^https?:/.test(s.label_studio_page)) {
    $("studio").href = s.label_studio_page;
    $("studio").hidden = false;
  }
  tiles([
    ["Running accuracy", r ? percent(r.value) : "–", r ? `${span(r)}, ${count(r.answers, "random answer")}` : "no random answer yet"],
    ["Labels", s.labels.toLocaleString("en"), `${s.test_labels} test labels besides`],
    ["Labels per hour", Math.round(s.labels_per_hour).toLocaleString("en"), "in the last ten minutes"],
    ["Round", s.round === null ? "none open" : String(s.round), s.round === null ? "" : `${s.settled} of ${s.round_size} answered`],
    ["At work", String(atWork), s.people.length ? `of ${s.people.length} who answered` : ""],
    ["Newest model knows", `${s.model_labels.toLocaleString("en")}`, `labels; ${s.stale} of ${s.queue.length} open questions are an earlier model's`],
  ]);
  $("stop").textContent = (s.stop.proposed ? "You may stop: " : "Go on: ") + s.stop.sentence + ".";
  const last = s.curve[s.curve.length - 1];
  $("curve-said").textContent = last
    ? `Solid: accuracy of published rounds on the test set. Dashed: running accuracy on the random share. Newest: ${last.what} ${percent(last.value)} at ${count(last.labels, "label")}.`
    : "No round is measured yet.";
  draw(s.curve);
  fill("points", "Accuracy by number of labels", ["labels", "measure", "round", "accuracy", "interval"],
    s.curve.map((p) => [{ n: p.labels.toLocaleString("en") }, p.what, { n: p.round }, { n: percent(p.value) }, { n: span(p) }]));
  fill("queue", count(s.queue.length, "open question"), ["text", "asked", "guess", "score", "knew", "waits"],
    s.queue.map((q) => [q.text || q.item_id, q.kind, q.predicted ? `${q.predicted}, ${percent(q.confidence)}` : "–",
      { n: fixed(q.score, 3) }, { n: count(q.answers_known, "answer") }, { n: ago(q.seconds) }]));
  const unsure = Math.max(...s.classes.map((one) => one.uncertainty || 0), 1e-9);
  fill("classes", "Labels, and how unsure the model is of what it takes for the class (mean score)",
    ["class", "labels", "predicted in a sample", "uncertainty", ""],
    s.classes.map((one) => {
      const bar = make("meter");
      bar.max = unsure; bar.value = one.uncertainty || 0; bar.setAttribute("aria-hidden", "true");
      return [one.name, { n: one.labels.toLocaleString("en") }, { n: one.predicted.toLocaleString("en") }, { n: fixed(one.uncertainty, 3) }, bar];
    }));
  fill("people", "People who answered in this round", ["person", "answers", "last answer", "at work"],
    s.people.map((one) => [one.name, { n: one.answers }, { n: ago(one.seconds_ago) + " ago" }, one.at_work ? "yes" : "no"]));
  speak();
}

function speak() { // polite, at most one sentence each SPEAK_MS
  const s = state, now = performance.now();
  const said = !connected ? "Not connected." : s.health !== "up" ? s.health
    : `Round ${s.round === null ? "none" : s.round}: ${s.settled} of ${s.round_size} answered, ${count(s.labels, "label")}` +
      (s.running && s.running.value !== null ? `, running accuracy ${percent(s.running.value)}` : "") + (s.stop.proposed ? ", you may stop" : "") + ".";
  if (said !== spoken && now - spokenAt >= SPEAK_MS) { $("spoken").textContent = spoken = said; spokenAt = now; }
}

function tell() {
  const age = state ? Math.max(0, Date.now() / 1000 - state.time) : null, hangs = age !== null && age > 120;
  $("age").textContent = age === null ? "never" : `${ago(age)} ago`;
  const badge = $("connection");
  const said = paused ? "paused" : !connected ? "not connected" : hangs ? "silent" : state && state.health !== "up" ? "not up" : "connected";
  if (badge.textContent !== said) { badge.textContent = said; badge.className = "badge " + (said === "connected" ? "on" : said === "paused" ? "" : "off"); }
  if (state) speak();
}

const events = new EventSource("events" + query);
events.onopen = () => { connected = true; tell(); };
events.onerror = () => {
  connected = false;
  if (events.readyState === EventSource.CLOSED) $("health").textContent = "this page ended: open the address that `al status` prints";
  tell();
};
events.onmessage = (event) => {
  connected = true;
  if (paused) return;
  state = JSON.parse(event.data);
  show();
  tell();
};
$("pause").onclick = () => {
  paused = !paused;
  $("pause").setAttribute("aria-pressed", String(paused));
  tell();
};
setInterval(tell, 1000);
