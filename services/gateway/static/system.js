// The state of the system: servers, workers, devices and queues.

import { ask, sentence } from "./api.js";
import { PHASES } from "./words.js";

const details = document.querySelector("#system");
const word = document.querySelector("#system-word");
const panel = document.querySelector("#system-panel");
/** Bytes for people, in GiB, or MiB where they are few. The number and its unit stay on one line. */
function size(bytes) {
  const few = bytes < 2 ** 30 / 10;
  return few ? `${Math.round(bytes / 2 ** 20)}\u00a0MiB` : `${(bytes / 2 ** 30).toFixed(1)}\u00a0GiB`;
}

function element(name, text = "", className = "") {
  const made = document.createElement(name);
  made.textContent = text;
  if (className) made.className = className;
  return made;
}

/** What is in the memory of a device: models by name, the caches of songs counted. */
function contents(resident) {
  const models = resident.filter((label) => !label.startsWith("kv-cache "));
  const caches = resident.length - models.length;
  if (caches) models.push(caches === 1 ? "the cache of 1 song" : `the caches of ${caches} songs`);
  return models.join(" and ") || "no model";
}

/** What the workers use the memory of a device for, and the songs that fit beside it. */
function plan(found) {
  const small = found.int8 === "off" ? "" : `, int8 ${found.int8}`;
  const parts = [
    `language model ${size(found.language_model)} (${found.language_model_dtype}${small}) and ${size(found.language_model_work)} to work`,
    `codec ${size(found.codec)} (${found.codec_dtype}) and ${size(found.codec_work)} to work`,
  ];
  if (found.contexts) parts.push(`CUDA ${size(found.contexts)}`, `kept back ${size(found.kept_back)}`);
  const ways = found.resident ? "Both models stay on the device" : "The models take turns on the device";
  const [one, two, three] = found.songs;
  return [
    `${ways}: ${parts.join(", ")}.`,
    `${size(found.for_songs)} are left for songs: ${one} of one minute, ${two} of two or ${three} of three.`,
  ];
}

function device(gpu) {
  const box = element("section");
  const bar = element("meter");
  bar.max = gpu.memory_total;
  bar.value = gpu.memory_used;
  bar.setAttribute("aria-label", `Memory of ${gpu.name}`);
  box.append(element("h2", gpu.name), bar);
  const facts = [`${size(gpu.memory_used)} of ${size(gpu.memory_total)} in use`];
  if (gpu.utilization != null) facts.push(`${gpu.utilization} % busy`);
  if (gpu.temperature != null) facts.push(`${gpu.temperature} °C`);
  box.append(element("p", facts.join(" · "), "hint"));
  box.append(element("p", `Loaded: ${contents(gpu.resident)}.`));
  if (gpu.lease) {
    const phase = gpu.lease.phase;
    const what = phase == null ? "" : `, phase ${phase}: ${PHASES[phase]}`;
    box.append(element("p", `Held by the ${gpu.lease.role}${what}.`));
  } else box.append(element("p", "No worker holds it."));
  if (gpu.plan) box.append(...plan(gpu.plan).map((line) => element("p", line, "hint")));
  for (const worker of gpu.workers) {
    const rate = worker.rate ? `, ${worker.rate.toFixed(1)} frames a second` : "";
    box.append(element("p", `${worker.role}: ${worker.model}, ${worker.state}${rate}`, "hint"));
    box.append(...worker.notes.map((note) => element("p", `${worker.role}: ${sentence(note)}`, "hint")));
  }
  return box;
}

function counted(count) {
  if (count == null) return "unknown";
  return count === 1 ? "1 song" : `${count} songs`;
}

/** Ask for the state once, and show it. */
export async function showSystem() {
  try {
    const health = await ask("/health");
    const parts = [];
    let summary = "Ready";
    if (!health.nats.ok) summary = "NATS does not answer: no songs can be taken.";
    else if (!health.object_store.ok) summary = "The object store does not answer: no songs can be taken.";
    else if (health.problems.length) summary = sentence(health.problems[0]);
    parts.push(...health.problems.map((problem) => element("p", sentence(problem), "error")));
    if (health.nats.ok) {
      const found = await ask("/api/gpu");
      const busy = (found.queue.tokens ?? 0) + (found.queue.decode ?? 0);
      if (summary === "Ready" && busy) summary = busy === 1 ? "1 song in progress" : `${busy} songs in progress`;
      parts.push(...found.gpus.map(device));
      const queue = `Queue for tokens: ${counted(found.queue.tokens)}. Queue for audio: ${counted(found.queue.decode)}.`;
      parts.push(element("p", queue));
      if (found.queue.encode) parts.push(element("p", `Recordings to be encoded: ${found.queue.encode}.`));
    }
    details.dataset.state = health.status;
    if (word.textContent !== summary) word.textContent = summary;
    panel.replaceChildren(...parts);
  } catch (error) {
    details.dataset.state = "unavailable";
    if (error.status !== 401 && word.textContent !== error.message) word.textContent = error.message;
  }
}
