// The page of `wmjax play`: draws what the server sends (wmjax/play/wire.py) and says what the person asks for.
"use strict";

const $ = (id) => document.getElementById(id);
const HISTORY = 2000; // steps of the lines that are kept
const SHOWN = 200; // and that are seen
const TOLD = 90; // milliseconds between two updates of words and lines, while it plays
const SPEEDS = [1, 2, 5, 10, 20, 30, 60, 120];

let socket = null;
let about = null; // what the server says of the game
let now = null; // the moment that is seen
let wanted = false; // whether a moment waits to be drawn
let lines = []; // one entry for each step: number, reward, cont, value, real, began
let drawn = []; // times of frames, of the last second
let told = 0; // time of the last update of words and lines
let rest = []; // what is done where nothing is pressed
let held = []; // inputs that are pressed, oldest first: {id, at, value}
let pausedByHiding = false;
let pointed = false; // whether a pointer was used last, and not the keyboard

// -------------------------------------------------------------------------------------------------- the connection

function connect() {
  held = [];
  const scheme = location.protocol === "https:" ? "wss:" : "ws:";
  socket = new WebSocket(`${scheme}//${location.host}${location.pathname.replace(/\/$/, "")}/live`);
  socket.binaryType = "arraybuffer";
  let why = "The server has ended, or cannot be reached.";
  socket.onmessage = (message) => {
    if (typeof message.data !== "string") return receive(message.data);
    const told = JSON.parse(message.data);
    if (told.hello) begin(told.hello);
    if (told.error) say(told.error, true);
    if (told.note) say(told.note);
    if (told.recording) offer(told.recording, told.frames);
    if (told.closed) why = told.closed;
  };
  socket.onclose = () => {
    $("closed-told").textContent = why;
    if (!$("closed").open) $("closed").showModal();
  };
}

function ask(what, more = {}) {
  if (socket && socket.readyState === WebSocket.OPEN) socket.send(JSON.stringify({ do: what, ...more }));
}

function say(text, isError = false) {
  $("status").textContent = text;
  $("status").classList.toggle("error", isError);
}

function receive(buffer) {
  ask("seen");
  now = read(buffer);
  remember(now);
  if (!wanted) requestAnimationFrame(draw);
  wanted = true;
}

function read(buffer) {
  const view = new DataView(buffer);
  const u8 = (i) => view.getUint8(i), u16 = (i) => view.getUint16(i, true);
  const u32 = (i) => view.getUint32(i, true), f32 = (i) => view.getFloat32(i, true);
  const moment = { driver: about.drivers[u8(1)], by: about.drivers[u8(2)] };
  about.flags.forEach((name, i) => (moment[name] = Boolean((u8(0) >> i) & 1)));
  ["number", "first", "last", "recorded"].forEach((name, i) => (moment[name] = u32(4 + 4 * i)));
  const [width, height, size] = [u16(20), u16(22), u16(24)];
  ["reward", "cont", "value", "dreamed", "real", "earned", "temperature", "speed"].forEach(
    (name, i) => (moment[name] = f32(28 + 4 * i)),
  );
  moment.action = Array.from({ length: size }, (_, i) => f32(about.header + 4 * i));
  const start = about.header + 4 * size, bytes = width * height * 3;
  moment.pictures = [0, 1].map((i) => new Uint8Array(buffer, start + i * bytes, bytes));
  return moment;
}

function remember(moment) {
  const line = { ...moment, pictures: null };
  if (moment.number < moment.last || (lines.length && lines[lines.length - 1].number >= moment.number)) {
    lines = lines.filter((x) => x.number <= moment.last && x.number !== moment.number); // it was gone back
    lines.push(line);
    lines.sort((a, b) => a.number - b.number);
  } else lines.push(line);
  if (lines.length > HISTORY) lines = lines.slice(-HISTORY / 2);
}

// --------------------------------------------------------------------------------------------------------- drawing

function draw() {
  wanted = false;
  paint($("dream"), now.pictures[0]);
  paint($("real"), now.pictures[1]);
  const time = performance.now();
  drawn = [...drawn.filter((t) => time - t < 1000), time];
  if (now.playing && time - told < TOLD) return; // the next moment is not far
  told = time;
  tell();
  drawLine("reward", [["reward", []], ["real", [4, 3]]]);
  drawLine("cont", [["cont", []]], [0, 1]);
  drawLine("value", [["value", []]]);
}

function paint(canvas, pixels) {
  const context = canvas.getContext("2d");
  canvas.image ??= context.createImageData(canvas.width, canvas.height);
  const image = canvas.image;
  for (let i = 0, j = 0; i < pixels.length; i += 3, j += 4) {
    image.data[j] = pixels[i];
    image.data[j + 1] = pixels[i + 1];
    image.data[j + 2] = pixels[i + 2];
    image.data[j + 3] = 255;
  }
  context.putImageData(image, 0, 0);
}

function set(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

const shown = (x) => (Number.isNaN(x) ? "–" : (Object.is(Math.round(x * 1000), -0) ? 0 : x).toFixed(Math.abs(x) < 10 ? 3 : 1));

function tell() {
  let dream = `step ${now.number}, return ${shown(now.dreamed)}`;
  if (now.cont < 0.5) dream += ", ■ it expects the end";
  else if (now.began) dream += ", ▶ begins here";
  set($("dream-told"), dream);
  let real = `return ${shown(now.earned)}`;
  if (now.stands) real = "❚❚ waits: it cannot go back";
  else if (now.is_terminal) real += ", ■ the episode ends";
  else if (now.is_last) real += ", ■ the time limit ends it";
  else if (now.is_first) real += ", ▶ an episode begins";
  set($("real-told"), real);
  set($("reward-told"), about.no_reward ? "not predicted" : `dream ${shown(now.reward)} —, real ${shown(now.real)} - -`);
  set($("cont-told"), shown(now.cont));
  set($("value-told"), about.no_value ? about.no_value : shown(now.value));
  set($("play"), now.playing ? "❚❚ Pause" : "▶ Play");
  set($("number"), `step ${now.number} of ${now.first} to ${now.last}`);
  set($("rate"), now.playing ? `${drawn.length} frames/s` : "");
  set($("by"), `by the ${now.by}`);
  const rewind = $("rewind");
  if (rewind.min !== String(now.first)) rewind.min = now.first;
  if (rewind.max !== String(now.last)) rewind.max = now.last;
  if (!rewind.dragged) rewind.value = now.number;
  $("back").disabled = now.number <= now.first;
  document.querySelectorAll("input[name=driver]").forEach((x) => (x.checked = x.value === now.driver));
  if ($("speed").value !== String(now.speed)) $("speed").value = String(now.speed);
  $("restart").checked = now.restart;
  if (!about.no_temperature && !$("temperature").dragged) {
    $("temperature").value = now.temperature;
    set($("temperature-told"), now.temperature.toFixed(2));
  }
  const record = $("record");
  record.setAttribute("aria-pressed", String(now.recording));
  set(record, now.recording ? "■ Stop" : "● Record");
  set($("recorded"), now.recording ? `${now.recorded} of at most ${about.most_recorded} frames` : "");
  tellAction();
}

function tellAction() {
  const { choices, numbers } = about.controls;
  if (choices) {
    let from = 0;
    choices.forEach((labels, which) => {
      const part = now.action.slice(from, from + labels.length);
      const index = part.indexOf(Math.max(...part));
      from += labels.length;
      document.querySelectorAll(`button[data-which="${which}"]`).forEach((button, i) => {
        button.classList.toggle("taken", i === index);
        button.classList.toggle("held", held.some((x) => x.at === which && x.value === i));
      });
    });
  }
  if (numbers) {
    numbers.forEach((_, i) => {
      set($(`number-told-${i}`), now.action[i].toFixed(2));
      if (now.driver !== "person") $(`number-${i}`).value = now.action[i];
    });
    const [x, y] = [now.action[0], numbers.length > 1 ? now.action[1] : 0];
    $("knob").style.left = `${50 + 44 * Math.max(-1, Math.min(1, x))}%`;
    $("knob").style.top = `${50 - 44 * Math.max(-1, Math.min(1, y))}%`;
  }
}

function drawLine(name, series, range = null) {
  const canvas = $(`${name}-line`), ratio = window.devicePixelRatio || 1;
  const [wide, high] = [canvas.clientWidth, canvas.clientHeight];
  if (canvas.width !== Math.round(wide * ratio)) canvas.width = Math.round(wide * ratio);
  if (canvas.height !== Math.round(high * ratio)) canvas.height = Math.round(high * ratio);
  const context = canvas.getContext("2d"), style = getComputedStyle(document.documentElement);
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, wide, high);
  const end = Math.max(now.last, SHOWN), some = lines.filter((line) => line.number > end - SHOWN && line.number <= end);
  const values = series.flatMap(([key]) => some.map((line) => line[key])).filter((x) => !Number.isNaN(x));
  let [low, top] = range || [Math.min(0, ...values), Math.max(0, ...values)];
  if (top - low < 1e-6) [low, top] = [low - 1, top + 1];
  const x = (number) => 3 + ((number - (end - SHOWN)) / SHOWN) * (wide - 6);
  const y = (value) => high - 5 - ((value - low) / (top - low)) * (high - 10);
  const stroke = (color, width, dash, path) => {
    context.beginPath();
    context.strokeStyle = style.getPropertyValue(color);
    context.lineWidth = width;
    context.setLineDash(dash);
    path();
    context.stroke();
  };
  stroke("--edge", 1, [1, 2], () => some.filter((line) => line.began).forEach((line) => {
    context.moveTo(x(line.number), 0);
    context.lineTo(x(line.number), high);
  }));
  stroke("--edge", 1, [], () => { context.moveTo(0, y(0)); context.lineTo(wide, y(0)); });
  series.forEach(([key, dash], i) => stroke(i ? "--real" : "--dream", 2, dash, () => {
    let last = null;
    some.forEach((line) => {
      if (Number.isNaN(line[key])) return (last = null);
      if (last === null || line.number > last + 40) context.moveTo(x(line.number), y(line[key]));
      else context.lineTo(x(line.number), y(line[key]));
      last = line.number;
    });
  }));
  stroke("--ink", 1, [], () => { context.moveTo(x(now.number), 0); context.lineTo(x(now.number), high); });
}

// --------------------------------------------------------------------------------------------------------- actions

function current() {
  const action = about.controls.numbers
    ? about.controls.numbers.map((_, i) => Number($(`number-${i}`).value))
    : [...rest];
  held.forEach(({ at, value }) => (action[at] = value));
  return action;
}

function press(inputs) {
  held = [...held.filter((x) => !inputs.some((y) => y.id === x.id)), ...inputs];
  if (now && now.driver !== "person") ask("drive", { who: "person" });
  ask("act", { action: current(), tap: true });
  if (now && !now.playing) ask("step");
}

function release(test) {
  if (!held.some(test)) return;
  held = held.filter((x) => !test(x));
  ask("act", { action: current(), tap: false });
  if (now) tellAction();
}

function makeChoices(choices) {
  choices.forEach((labels, which) => {
    const group = document.createElement("div");
    group.className = "choices";
    group.setAttribute("role", "group");
    group.setAttribute("aria-label", choices.length > 1 ? `choice ${which + 1}` : "actions");
    labels.forEach((label, index) => {
      const button = document.createElement("button");
      button.type = "button";
      button.dataset.which = which;
      button.append(label);
      const key = keyOf(which, index);
      if (key) {
        const kbd = document.createElement("kbd");
        kbd.textContent = key;
        button.append(" ", kbd);
      }
      const id = `button-${which}-${index}`, input = { id, at: which, value: index };
      button.onpointerdown = (event) => { event.preventDefault(); button.setPointerCapture(event.pointerId); press([input]); };
      button.onpointerup = button.onpointercancel = button.onlostpointercapture = () => release((x) => x.id === id);
      button.oncontextmenu = (event) => event.preventDefault();
      button.onkeydown = (event) => {
        if (event.key !== "Enter" && event.key !== " ") return;
        event.preventDefault();
        event.stopPropagation();
        if (!event.repeat) press([input]);
      };
      button.onkeyup = (event) => { if (event.key === "Enter" || event.key === " ") release((x) => x.id === id); };
      button.onblur = () => release((x) => x.id === id);
      group.append(button);
    });
    $("inputs").append(group);
    if (labels.length > 1) $("inputs").append(makeRest(labels, which));
  });
}

function makeRest(labels, which) {
  const label = document.createElement("label"), select = document.createElement("select");
  labels.forEach((text, i) => select.append(new Option(text, i, i === rest[which], i === rest[which])));
  select.onchange = () => {
    rest[which] = Number(select.value);
    ask("act", { action: current(), tap: false });
    leave(select);
  };
  label.append("When nothing is pressed: ", select);
  return label;
}

function keyOf(which, index) {
  const arrows = { ArrowLeft: "←", ArrowRight: "→", ArrowUp: "↑", ArrowDown: "↓" };
  const found = Object.entries(about.controls.keys).find(([, at]) => at[0] === which && at[1] === index);
  if (found) return arrows[found[0]];
  return which === 0 && index < 9 ? String(index + 1) : "";
}

function makeNumbers(numbers) {
  numbers.forEach((name, i) => {
    const label = document.createElement("label"), slider = document.createElement("input"), told = document.createElement("output");
    label.className = "wide";
    Object.assign(slider, { type: "range", min: -1, max: 1, step: 0.01, id: `number-${i}`, value: rest[i] });
    told.id = `number-told-${i}`;
    slider.oninput = () => {
      if (now && now.driver !== "person") ask("drive", { who: "person" });
      ask("act", { action: current(), tap: false });
    };
    slider.ondblclick = () => { slider.value = rest[i]; slider.oninput(); };
    label.append(name, slider, told);
    $("inputs").append(label);
  });
  const pad = $("pad");
  pad.hidden = false;
  pad.classList.toggle("flat", numbers.length === 1);
  const at = (event) => {
    const box = pad.getBoundingClientRect(), cut = (x) => Math.max(-1, Math.min(1, x));
    const inputs = [{ id: "pad-0", at: 0, value: cut((2.2 * (event.clientX - box.left)) / box.width - 1.1) }];
    if (numbers.length > 1) inputs.push({ id: "pad-1", at: 1, value: cut(1.1 - (2.2 * (event.clientY - box.top)) / box.height) });
    return inputs;
  };
  pad.onpointerdown = (event) => { pad.setPointerCapture(event.pointerId); pad.focus({ preventScroll: true }); press(at(event)); };
  pad.onpointermove = (event) => {
    if (!pad.hasPointerCapture(event.pointerId)) return;
    held = [...held.filter((x) => !x.id.startsWith("pad")), ...at(event)];
    ask("act", { action: current(), tap: false });
  };
  pad.onpointerup = pad.onpointercancel = pad.onlostpointercapture = () => release((x) => x.id.startsWith("pad"));
}

// ------------------------------------------------------------------------------------------------------------ keys

const KEYS = {
  " ": ["Space", "play or pause", () => ask("play", { on: !now.playing })],
  ".": [".", "one step", () => ask("step")],
  ",": [",", "one step back", () => back()],
  p: ["p", "a person drives", () => ask("drive", { who: "person" })],
  a: ["a", "the agent drives", () => ask("drive", { who: "agent" })],
  l: ["l", "the planner drives", () => ask("drive", { who: "planner" })],
  d: ["d", "the dream begins from the real environment, as it is seen", () => ask("dream")],
  n: ["n", "a new episode", () => ask("episode")],
  o: ["o", "other noise from here on", () => ask("redraw")],
  r: ["r", "begin or end a recording", () => ask("record", { on: !now.recording })],
};

function back() {
  if (now.number > now.first) ask("at", { number: now.number - 1 });
}

function inputOf(key) {
  const { keys, choices } = about.controls;
  if (keys[key]) return { id: key, at: keys[key][0], value: keys[key][1] };
  const index = Number(key) - 1;
  if (choices && /^[1-9]$/.test(key) && index < choices[0].length) return { id: key, at: 0, value: index };
  return null;
}

// After a pointer has set something, keys are for actions again; who uses the keyboard stays where it is.
function leave(element) {
  if (pointed) element.blur();
}

document.addEventListener("pointerdown", () => (pointed = true), true);
document.addEventListener("keydown", () => (pointed = false), true);
document.addEventListener("keydown", (event) => {
  if (!now || event.ctrlKey || event.metaKey || event.altKey || $("closed").open) return;
  const target = event.target, tag = target.tagName;
  const takes = tag === "SELECT" || (tag === "INPUT" && target.type !== "checkbox" && event.key.startsWith("Arrow"));
  const input = inputOf(event.key);
  if (input) {
    if (takes) return; // sliders and lists have uses for these keys
    event.preventDefault();
    if (!event.repeat) press([input]);
  } else if (KEYS[event.key]) {
    if (event.key === " " && ["BUTTON", "INPUT", "SELECT", "SUMMARY", "A"].includes(tag)) return;
    event.preventDefault();
    if (!event.repeat || event.key === "." || event.key === ",") KEYS[event.key][2]();
  }
});
document.addEventListener("keyup", (event) => release((x) => x.id === event.key));
window.addEventListener("blur", () => release(() => true));
document.addEventListener("visibilitychange", () => {
  if (document.hidden && now && now.playing) {
    pausedByHiding = true;
    ask("play", { on: false });
  } else if (!document.hidden && pausedByHiding) {
    pausedByHiding = false;
    ask("play", { on: true });
  }
});

// --------------------------------------------------------------------------------------------------------- the page

function begin(hello) {
  about = hello;
  now = null;
  lines = [];
  rest = [...about.controls.rest];
  document.title = `${about.title} – wmjax play`;
  $("title").textContent = about.title;
  say("Paused at the first moment: press Play, or an action.");
  for (const [canvas, most] of [[$("dream"), 66], [$("real"), 36]]) {
    [canvas.width, canvas.height, canvas.image] = [about.width, about.height, null];
    canvas.style.maxWidth = `${(most * about.width) / about.height}vh`;
  }
  $("inputs").replaceChildren();
  if (about.controls.choices) makeChoices(about.controls.choices);
  else makeNumbers(about.controls.numbers);
  $("speed").replaceChildren(...SPEEDS.map((x) => new Option(`${x} steps/s`, x)));
  $("no-plan").textContent = about.no_plan ? `No planner: ${about.no_plan}.` : "";
  document.querySelector("input[value=planner]").disabled = Boolean(about.no_plan);
  const slider = $("temperature");
  slider.disabled = Boolean(about.no_temperature);
  if (!about.no_temperature) [slider.min, slider.max] = about.temperatures;
  $("temperature-told").textContent = "";
  $("no-temperature").textContent = about.no_temperature ? `Not here: ${about.no_temperature}.` : "";
  const arrows = Object.keys(about.controls.keys).length ? [["arrows", "actions, while they are held"]] : [];
  const digits = about.controls.choices ? [["1 to 9", "actions by their order"]] : [];
  const all = [...arrows, ...digits, ...Object.values(KEYS).map(([key, what]) => [key, what])];
  $("keys").replaceChildren(...all.flatMap(([key, what]) => {
    const [name, meaning, kbd] = ["dt", "dd", "kbd"].map((tag) => document.createElement(tag));
    kbd.textContent = key;
    name.append(kbd);
    meaning.textContent = what;
    return [name, meaning];
  }));
}

function offer(files, frames) {
  const item = document.createElement("li"), size = (bytes) => (bytes < 1e6 ? `${Math.ceil(bytes / 1e3)} kB` : `${(bytes / 1e6).toFixed(1)} MB`);
  item.append(`${frames} frames: `);
  Object.entries(files).forEach(([kind, [path, bytes]], i) => {
    const link = document.createElement("a");
    Object.assign(link, { href: path, download: `dream.${kind}`, textContent: `${kind.toUpperCase()} (${size(bytes)})` });
    item.append(i ? ", " : "", link);
  });
  $("recordings").append(item);
  while ($("recordings").children.length > 3) $("recordings").firstChild.remove();
  say(about.ffmpeg ? "The recording is ready." : "The recording is ready; with ffmpeg installed there would be an MP4, too.");
}

function dragged(slider, use) {
  slider.oninput = () => { slider.dragged = true; use(Number(slider.value)); };
  slider.onchange = () => { slider.dragged = false; };
  slider.onpointerup = () => { slider.dragged = false; leave(slider); };
}

$("play").onclick = () => ask("play", { on: !now.playing });
$("back").onclick = back;
$("step").onclick = () => ask("step");
$("from-real").onclick = () => ask("dream");
$("episode").onclick = () => ask("episode");
$("redraw").onclick = () => ask("redraw");
$("record").onclick = () => ask("record", { on: !now.recording });
$("restart").onchange = (event) => { ask("restart", { on: event.target.checked }); leave(event.target); };
$("speed").onchange = (event) => { ask("speed", { value: Number(event.target.value) }); leave(event.target); };
document.querySelectorAll("input[name=driver]").forEach((x) => (x.onchange = () => { ask("drive", { who: x.value }); leave(x); }));
dragged($("rewind"), (number) => ask("at", { number }));
dragged($("temperature"), (value) => { ask("temperature", { value }); $("temperature-told").textContent = value.toFixed(2); });
$("again").onclick = () => { $("closed").close(); connect(); };
connect();
