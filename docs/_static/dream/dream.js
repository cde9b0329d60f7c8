// A dream played in the browser: one step of a model by onnxruntime-web, again and again. All files are beside this one.
"use strict";

const $ = (id) => document.getElementById(id);
const FOLDER = new URL(".", document.currentScript.src);
const AGENTS = {
  "dreamer_v3-catch": "DreamerV3, catch", "dreamer_v3-pendulum": "DreamerV3, pendulum", "dreamer_v2-catch": "DreamerV2, catch",
  "dreamer_v1-catch": "DreamerV1, catch", "world_models-catch": "World Models, catch", "iris-catch": "IRIS, catch",
};
const KINDS = { float32: Float32Array, int32: Int32Array, bool: Uint8Array, uint8: Uint8Array };
const DRAWS = {
  uniform: () => Math.random(),
  gumbel: () => -Math.log(-Math.log(1 - Math.random() * (1 - 1e-12) - 1e-13)),
  normal: () => Math.sqrt(-2 * Math.log(1 - Math.random())) * Math.cos(2 * Math.PI * Math.random()),
};

let game = null; // {about, session}
let state = null, start = -1, number = 0, playing = false, busy = false, times = [], loads = 0;
const held = new Map(); // what is pressed, by key or button: [which, value]
let values = []; // an index for each choice, or a number in [-1, 1]

async function unpacked(name) {
  const found = await fetch(new URL(name, FOLDER));
  if (!found.ok) throw new Error(`${name}: ${found.status}`);
  return new Response(found.body.pipeThrough(new DecompressionStream("gzip"))).arrayBuffer();
}

async function load(name) {
  const mine = ++loads, before = game;
  playing = false;
  game = null;
  $("status").textContent = "Loading …";
  while (busy) await new Promise((done) => setTimeout(done, 10)); // a step of the model before
  await before?.session.release();
  if (!ort.env.wasm.wasmBinary) {
    ort.env.wasm.numThreads = 1;
    ort.env.wasm.wasmPaths = new URL("runtime/", FOLDER).href;
    ort.env.wasm.wasmBinary = await unpacked("runtime/ort-wasm-simd-threaded.wasm.gz");
  }
  const about = await (await fetch(new URL(`models/${name}.json`, FOLDER))).json();
  const model = new Uint8Array(await unpacked(`models/${name}.onnx.gz`));
  const session = await ort.InferenceSession.create(model, { executionProviders: ["wasm"], logSeverityLevel: 3 });
  if (mine !== loads) return session.release();
  game = { about, session };
  controls();
  $("about").textContent = `${about.title}. Keys: ${keys().join(", ") || "none"}, space plays, “.” steps, r starts again.`;
  begin();
  $("status").textContent = "Ready: the model runs in this page.";
  document.documentElement.dataset.ready = name;
}

function tensor(name, data) {
  const { shape, dtype } = game.about.inputs[name];
  return new ort.Tensor(dtype, KINDS[dtype].from(data), shape);
}

function begin() {
  const starts = game.about.starts;
  start = (start + 1) % starts.length;
  state = {};
  for (const [name, data] of Object.entries(starts[start].state)) state[name] = tensor(name, data);
  number = 0;
  const image = new Image();
  image.onload = () => {
    if (number) return;
    $("dream").width = image.width;
    $("dream").height = image.height;
    $("dream").getContext("2d").drawImage(image, 0, 0);
  };
  image.src = Object.values(starts[start].frame)[0];
  tell({});
}

async function step() {
  if (!game || busy) return;
  busy = true;
  try {
    const { about, session } = game, from = state, given = { ...state };
    for (const [name, { shape }] of Object.entries(about.inputs)) {
      const size = shape.reduce((a, b) => a * b, 1);
      if (name.startsWith("noise.")) given[name] = tensor(name, Array.from({ length: size }, DRAWS[name.split(".").pop()]));
      if (name === "temperature") given[name] = tensor(name, [about.temperature]);
    }
    given.action = tensor("action", action());
    const found = await session.run(given);
    if (state !== from) return; // it has begun again meanwhile
    for (const name of Object.keys(state)) state[name] = found[name.replace(/^state/, "next")];
    number += 1;
    draw(found);
    tell(found);
  } catch (error) {
    playing = false;
    $("status").textContent = `The step failed: ${error.message}`;
  } finally {
    busy = false;
  }
}

function draw(found) {
  const frame = found[Object.keys(found).find((name) => name.startsWith("frame."))];
  const [, height, width, channels] = frame.dims, canvas = $("dream");
  if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
  const picture = new ImageData(width, height);
  for (let i = 0; i < width * height; i++) {
    for (let c = 0; c < 3; c++) picture.data[4 * i + c] = Math.round(255 * frame.data[channels * i + Math.min(c, channels - 1)]);
    picture.data[4 * i + 3] = 255;
  }
  canvas.getContext("2d").putImageData(picture, 0, 0);
}

function tell(found) {
  const shown = (x) => (x ? x.data[0].toFixed(2) : "–");
  $("number").textContent = number;
  $("reward").textContent = shown(found.reward);
  $("continue").textContent = shown(found.continue);
  const now = performance.now();
  times = number ? [...times.filter((time) => now - time < 1000), now] : [];
  $("rate").textContent = times.length;
}

// Actions: buttons and keys for choices, a slider and keys for numbers.

function action() {
  const now = [...values];
  for (const [which, value] of held.values()) now[which] = value;
  const { choices } = game.about.controls;
  return choices ? choices.flatMap((labels, i) => labels.map((_, j) => +(now[i] === j))) : now;
}

function keys() {
  return Object.keys(game.about.controls.keys).map((key) => key.replace("Arrow", "").toLowerCase());
}

function controls() {
  const { choices, numbers, rest } = game.about.controls;
  values = [...rest];
  held.clear();
  const press = (button, which, value) => {
    const down = (event) => { event.preventDefault(); hold(button, which, value); };
    button.addEventListener("pointerdown", down);
    for (const end of ["pointerup", "pointerleave", "pointercancel"]) button.addEventListener(end, () => release(button));
    button.addEventListener("click", (event) => { if (!event.detail) { hold(button, which, value); release(button); } });
    button.dataset.place = `${which} ${value}`;
    return button;
  };
  const made = choices
    ? choices.flatMap((labels, which) => labels.map((label, value) => press(element("button", label), which, value)))
    : numbers.map((label, which) => {
        const slider = Object.assign(document.createElement("input"), { type: "range", min: -1, max: 1, step: 0.05, value: rest[which] });
        slider.addEventListener("input", () => { values[which] = +slider.value; });
        const row = element("label", label);
        row.append(slider);
        return row;
      });
  $("actions").replaceChildren(...made);
}

function element(kind, text) {
  return Object.assign(document.createElement(kind), { textContent: text });
}

function hold(source, which, value) {
  if (held.has(source)) return;
  held.set(source, [which, value]);
  mark();
  if (!playing) step();
}

function release(source) {
  held.delete(source);
  mark();
}

function mark() {
  const places = [...held.values()].map((place) => place.join(" "));
  for (const button of $("actions").children) button.classList.toggle("held", places.includes(button.dataset.place));
}

// Time.

async function play() {
  playing = !playing;
  $("play").textContent = playing ? "❚❚ Pause" : "▶ Play";
  while (playing) {
    const before = performance.now(), speed = +$("speed").value;
    await step();
    if (!playing) break;
    const left = speed ? 1000 / speed - (performance.now() - before) : 0;
    await (left > 4 ? new Promise((done) => setTimeout(done, left)) : new Promise(requestAnimationFrame));
  }
  $("play").textContent = "▶ Play";
}

addEventListener("keydown", (event) => {
  if (!game || event.target.tagName === "SELECT" || event.ctrlKey || event.metaKey || event.altKey) return;
  const place = game.about.controls.keys[event.key];
  if (place && !event.repeat) hold(event.key, ...place);
  else if (event.key === " " && event.target.tagName !== "BUTTON") play();
  else if (event.key === ".") step();
  else if (event.key === "r") begin();
  else if (!place) return;
  event.preventDefault();
});
addEventListener("keyup", (event) => release(event.key));
addEventListener("blur", () => { held.clear(); mark(); });
$("play").addEventListener("click", play);
$("step").addEventListener("click", step);
$("again").addEventListener("click", begin);

for (const [name, label] of Object.entries(AGENTS)) $("agent").append(new Option(label, name));
const asked = location.hash.slice(1);
if (asked in AGENTS) $("agent").value = asked;
function change() {
  const mine = loads + 1;
  load($("agent").value).catch((error) => { if (mine === loads) $("status").textContent = `It cannot be loaded: ${error.message}`; });
}
$("agent").addEventListener("change", change);
change();
