// The form, and the line that says how the system is.

import { Refused, ask, sentence } from "./api.js";
import { add, restore } from "./songs.js";

const form = document.querySelector("#compose");
const house = document.querySelector("#house");
const NUMBERS = ["temperature", "cfg_scale", "topk", "seed"];
const LOOK_EVERY = 5_000; // ms

/** What the form says, as the API takes it; what is left empty is left out. */
function request() {
  const values = Object.fromEntries(new FormData(form));
  const body = { lyrics: values.lyrics, tags: values.tags, format: values.format, priority: values.priority };
  if (values.title.trim()) body.title = values.title.trim();
  for (const name of NUMBERS) {
    if (bad(name)) throw new Refused(0, "Give a number.", name);
    if (values[name] !== "") body[name] = Number(values[name]);
  }
  if (bad("max_duration_ms")) throw new Refused(0, "Give a number of seconds.", "max_duration_ms");
  if (values.max_duration_ms !== "") body.max_duration_ms = Math.round(Number(values.max_duration_ms) * 1000);
  return body;
}

function bad(name) {
  return form.elements[name].validity.badInput; // the browser reads such a field as empty
}

function name(body) {
  const line = body.lyrics.split("\n").map((text) => text.trim()).find((text) => text && !text.startsWith("["));
  return body.title || line || body.tags || "A song";
}

function clearErrors() {
  for (const text of form.querySelectorAll(".error")) text.hidden = true;
  for (const input of form.elements) input.removeAttribute("aria-invalid");
}

function showError(error) {
  const input = error.field ? form.elements[error.field] : null;
  const text = document.getElementById(input ? `${error.field}-error` : "form-error");
  text.textContent = error.message;
  text.hidden = false;
  if (input) {
    if (document.querySelector("#advanced").contains(input)) document.querySelector("#advanced").open = true;
    input.setAttribute("aria-invalid", "true");
    input.focus();
  }
}

form.onsubmit = async (event) => {
  event.preventDefault();
  clearErrors();
  const button = form.querySelector("button[type=submit]");
  button.disabled = true;
  try {
    const body = request();
    const answer = await ask("/generate", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(body),
    });
    add(answer.job_id, name(body));
  } catch (error) {
    showError(error);
  } finally {
    button.disabled = false;
  }
};

const gigabytes = (bytes) => `${(bytes / 2 ** 30).toFixed(1)} GB`;

function device(gpu) {
  const memory = `${gigabytes(gpu.memory_used)} of ${gigabytes(gpu.memory_total)}`;
  const lies = gpu.resident.length ? `, holds ${gpu.resident.join(" and ")}` : "";
  const turn = gpu.lease ? `, ${gpu.lease.role}'s turn in phase ${gpu.lease.phase ?? "–"}` : "";
  return `${gpu.name}: ${memory}${lies}${turn}`;
}

async function look() {
  let words;
  let fine = false;
  try {
    const health = await ask("/health");
    fine = health.status === "ok";
    if (!health.nats.ok) words = "NATS does not answer: no songs can be accepted.";
    else if (!health.object_store.ok) words = "The object store does not answer: no songs can be accepted.";
    else if (health.problems.length) words = health.problems.map(sentence).join(" ");
    if (health.nats.ok) {
      const gpus = await ask("/api/gpu");
      const waiting = gpus.queue.tokens + gpus.queue.decode;
      words = [words, ...gpus.gpus.map(device), waiting === 1 ? "1 song in work" : `${waiting} songs in work`]
        .filter(Boolean)
        .join(" · ");
    }
  } catch (error) {
    fine = false;
    words = error.message;
  }
  if (house.textContent !== words) house.textContent = words;
  house.classList.toggle("bad", !fine);
}

restore();
look();
setInterval(() => document.hidden || look(), LOOK_EVERY);
