// Puts the parts together: what the server says goes to them, what the user does goes to it.

import { Connection, address } from "./socket.js";
import { Frames } from "./frames.js";
import { Stage } from "./stage.js";
import { Stack } from "./stack.js";
import { Words } from "./words.js";

const $ = (id) => document.getElementById(id);
const LARGEST = 256 * 1024; // bytes of a run.json

const stage = new Stage();
const send = (message) => connection.send(message);
const words = new Words({ send });
const stack = new Stack({ send, chosen: (layer) => {
  words.choose(layer);
  stage.dim(layer !== null);
} });
const moves = []; // milliseconds from a move to its picture, the last ones
const pictures = []; // when pictures came
let me = null;
let revision = null; // of the clip that the form shows
let newest = 0; // of the packets that came: an older one that is decoded late is not shown

const connection = new Connection({
  status(connected, reason) {
    document.body.classList.toggle("lost", !connected);
    if (!connected) {
      $("doing").textContent = reason || "No connection: trying again …";
      $("progress").hidden = $("cancel").hidden = true;
    } else words.again();
  },
  message(message) {
    ({ hello: greet, state: show, stats: measure, problem: complain })[message.type]?.(message);
  },
  async packet(header, bytes) {
    const order = ++newest;
    if (header.clip === "mask" && header.places.length === 0) return stage.show("mask", null);
    const frames = await Frames.of(header, bytes);
    if (order < (packets.get(header.clip) ?? 0)) return;
    packets.set(header.clip, order);
    stage.show(header.clip, frames);
    if (header.clip === "edited") stage.drawn.push(() => onScreen(header));
  },
});
const packets = new Map();

// A picture is on the screen: say so, for the server sends no more than can be shown, and measure.
function onScreen(header) {
  send({ type: "shown", number: header.number });
  const now = performance.now();
  if (header.stamp !== null && header.mover === me && !header.exact) {
    moves.push(now - header.stamp);
    if (moves.length > 40) moves.shift();
    const sorted = [...moves].sort((a, b) => a - b);
    $("latency").textContent = `${Math.round(sorted[sorted.length >> 1])} ms`;
    document.body.dataset.latency = sorted[sorted.length >> 1].toFixed(1);
  }
  pictures.push(now);
  document.body.dataset.pictures = Number(document.body.dataset.pictures ?? 0) + 1;
  document.body.dataset.picture = header.digest;
  $("kind").textContent = header.sampling ? `sampling, step ${header.sampling}` : header.exact ? "decoded" : "preview";
  $("shown").textContent = `${header.places.length} × ${header.width}×${header.height}`;
}

setInterval(() => {
  const now = performance.now();
  while (pictures.length && pictures[0] < now - 1000) pictures.shift();
  $("rate").textContent = `${pictures.length}`;
}, 500);

// --- What the server says ---

function greet(message) {
  me = message.client;
  $("kinds").replaceChildren(
    ...message.kinds.map((kind) => {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = kind.label;
      button.title = kind.about;
      button.onclick = () => (kind.clip ? ask(kind) : send({ type: "add", kind: kind.kind }));
      return button;
    }),
  );
}

function show(state) {
  const { clip, job } = state;
  if (clip && revision !== clip.revision) {
    revision = clip.revision;
    for (const name of ["prompt", "seed", "steps", "guidance"]) $(name).value = clip[name];
  }
  if (!clip && state.defaults && !$("steps").value) {
    $("seed").value = 0;
    $("steps").value = state.defaults.steps;
    $("guidance").value = state.defaults.guidance;
  }
  $("device").textContent = state.device || "–";
  $("device").title = state.model;
  $("doing").textContent = job?.text ?? (clip ? "Ready" : "Write a prompt, and make a clip");
  $("progress").hidden = !job?.of;
  $("progress").max = job?.of || 1;
  $("progress").value = job?.done ?? 0;
  $("cancel").hidden = !job?.stoppable;
  $("undo").disabled = !state.undo;
  $("redo").disabled = !state.redo;
  $("digest").textContent = state.layers.length ? state.digest : "";
  for (const [id, path] of [["export-mp4", "export/clip.mp4"], ["export-run", "export/run.json"]]) {
    const ready = id === "export-run" ? clip !== null : state.ready;
    $(id).setAttribute("aria-disabled", String(!ready));
    if (ready) $(id).href = address(path);
    else $(id).removeAttribute("href");
  }
  stack.show(state.layers);
  words.show(state.words, state.note);
  document.body.dataset.ready = String(state.ready && !job && !state.waits);
  document.body.dataset.recipe = state.digest;
}

function measure({ clients, rate, median }) {
  $("tabs").textContent = clients;
  $("rate").title = `the server makes ${rate.toFixed(0)} a second, ${(median * 1000).toFixed(1)} ms each`;
}

function complain({ text }) {
  const box = document.createElement("div");
  const line = document.createElement("span");
  const close = document.createElement("button");
  line.textContent = text;
  close.type = "button";
  close.className = "quiet";
  close.textContent = "✕";
  close.setAttribute("aria-label", "Dismiss");
  close.onclick = () => box.remove();
  box.append(line, close);
  const list = $("problems");
  list.append(box);
  while (list.children.length > 3) list.firstChild.remove();
  setTimeout(() => box.remove(), 12000);
}

// --- What the user does ---

$("generate").onsubmit = (event) => {
  event.preventDefault();
  send({
    type: "generate",
    prompt: $("prompt").value,
    seed: Number($("seed").value),
    steps: Number($("steps").value),
    guidance: Number($("guidance").value),
  });
};
$("prompt").onkeydown = (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("generate").requestSubmit();
};
$("cancel").onclick = () => send({ type: "cancel" });
$("undo").onclick = () => send({ type: "undo" });
$("redo").onclick = () => send({ type: "redo" });

function ask(kind) {
  $("other-title").textContent = kind.label;
  $("other-prompt").value = $("prompt").value;
  $("other-seed").value = (Number($("seed").value) + 1) % 2 ** 32;
  $("other-form").onsubmit = () =>
    send({ type: "add", kind: kind.kind, prompt: $("other-prompt").value, seed: Number($("other-seed").value) });
  $("other").showModal();
  $("other-prompt").select();
}
$("other-cancel").onclick = () => $("other").close();

document.addEventListener("keydown", (event) => {
  const typing = event.target.matches("textarea, input[type=number]");
  const command = event.ctrlKey || event.metaKey;
  if (command && event.key.toLowerCase() === "z" && !typing) {
    event.preventDefault();
    send({ type: event.shiftKey ? "redo" : "undo" });
  } else if (!command && !typing && !$("other").open) {
    if (event.key === " " && !event.target.matches("button, a, input[type=checkbox]")) {
      event.preventDefault();
      stage.play(!stage.playing);
    } else if (event.key === "c") stage.compare($("wipe").hidden);
  }
});

async function open(file) {
  if (file.size > LARGEST) return complain({ text: `${file.name} is too large for a run.json` });
  let run;
  try {
    run = JSON.parse(await file.text());
  } catch {
    return complain({ text: `${file.name} is no JSON` });
  }
  send({ type: "open", run });
}
$("import").onclick = () => $("import-file").click();
$("import-file").onchange = ({ target }) => {
  if (target.files[0]) open(target.files[0]);
  target.value = "";
};
const files = (event) => event.dataTransfer?.types.includes("Files");
addEventListener("dragover", (event) => {
  if (!files(event)) return;
  event.preventDefault();
  $("drop").hidden = false;
});
addEventListener("dragleave", (event) => {
  if (event.relatedTarget === null) $("drop").hidden = true;
});
addEventListener("drop", (event) => {
  $("drop").hidden = true;
  if (!files(event)) return;
  event.preventDefault();
  if (event.dataTransfer.files[0]) open(event.dataTransfer.files[0]);
});
