// The form: lyrics with their sections, tags, length, and all other settings of a song.

import { Refused, post } from "./api.js";
import { continuation, lengthBeside, origin, originFields, setOrigin } from "./continuation.js";
import { exact } from "./words.js";

const form = document.querySelector("#compose");
const lyrics = form.elements.lyrics;
const behind = document.querySelector(".behind");
const chosen = document.querySelector("#tags");
const entry = document.querySelector("#tag-entry");
const instrumental = document.querySelector("#instrumental");
const later = document.querySelector("#not_before");
const seconds = document.querySelector("#seconds");
const fit = document.querySelector("#fit");
const LONGEST = Number(seconds.max); // seconds
let longest = LONGEST; // that can be chosen: more for a version of a longer song
const NUMBERS = ["temperature", "cfg_scale", "topk", "seed"];
const FIT_AFTER = 500; // ms without a key stroke
const DRAFT = "heartmula-draft"; // keeps what was typed over a reload
const SECTION = /^\s*\[[^\]]+\]\s*$/; // a line that begins one
const HINTS = ["A line such as [Verse] begins a section.", "Words are left out; lines such as [Intro] are not."];
const WORDLESS = "instrumental"; // the tag that the service adds to a song without words
const MARK = " ✕"; // behind a chosen tag
let tags = [...chosen.children].map((item) => item.textContent.trim().replace(MARK, ""));
let measuring = 0;
let measured = 0; // the latest answer that was asked for

/** Draw the layer behind the text: a mark under the name of each section. */
function paint() {
  behind.replaceChildren();
  for (const line of lyrics.value.split("\n")) {
    const part = document.createElement(SECTION.test(line) ? "mark" : "span");
    part.textContent = line;
    behind.append(part, "\n");
  }
  behind.scrollTop = lyrics.scrollTop;
}

/** Lyrics as the song is to have them: section marks alone where it has no words. What was typed stays. */
function words() {
  const lines = lyrics.value.split("\n").filter((line) => !instrumental.checked || SECTION.test(line));
  return instrumental.checked ? { lyrics: lines.join("\n"), instrumental: true } : { lyrics: lyrics.value };
}

function insert(section) {
  const at = lyrics.selectionStart;
  const before = lyrics.value.slice(0, at);
  const gap = before === "" || before.endsWith("\n") ? "" : "\n";
  lyrics.setRangeText(`${gap}[${section}]\n`, at, lyrics.selectionEnd, "end");
  lyrics.focus();
  changed();
}

function button(text, label, act) {
  const made = document.createElement("button");
  made.type = "button";
  made.className = "chip";
  made.textContent = text;
  made.setAttribute("aria-label", label);
  made.onclick = act;
  return made;
}

function setTags(wanted) {
  tags = [...new Set(wanted.map((tag) => tag.trim().toLowerCase()).filter(Boolean))];
  chosen.replaceChildren(
    ...tags.map((tag) => {
      const item = document.createElement("li");
      item.append(button(tag + MARK, `Remove ${tag}`, () => (setTags(tags.filter((other) => other !== tag)), entry.focus())));
      return item;
    }),
  );
  for (const suggestion of document.querySelectorAll("#suggestions .chip"))
    suggestion.setAttribute("aria-pressed", String(tags.includes(suggestion.textContent)));
  changed();
}

function takeEntry() {
  if (entry.value.trim()) setTags([...tags, ...entry.value.split(",")]);
  entry.value = "";
}

function suggest() {
  for (const chip of document.querySelectorAll("#suggestions .chip")) {
    const word = chip.textContent;
    chip.onclick = () => setTags(tags.includes(word) ? tags.filter((other) => other !== word) : [...tags, word]);
  }
}

function length(ms) {
  const whole = Math.floor(ms / 1000);
  return whole < 120 ? `${whole} s` : `${Math.floor(whole / 60)} min ${whole % 60} s`;
}

/** Show what fits, a moment after text or length have changed. */
function changed() {
  paint();
  document.querySelector("#lyrics-hint").textContent = HINTS[Number(instrumental.checked)];
  document.querySelector("#seconds-word").textContent = length(seconds.value * 1000);
  clearTimeout(measuring);
  measuring = setTimeout(measure, FIT_AFTER);
  keep();
}

function keep() {
  const draft = { lyrics: lyrics.value, title: form.elements.title.value, tags, seconds: seconds.value, origin: origin() };
  draft.instrumental = instrumental.checked;
  try {
    localStorage.setItem(DRAFT, JSON.stringify(draft));
  } catch {
    // private windows may have no room for it
  }
}

function recall() {
  try {
    const draft = JSON.parse(localStorage.getItem(DRAFT));
    lyrics.value = draft.lyrics;
    instrumental.checked = Boolean(draft.instrumental);
    form.elements.title.value = draft.title;
    makeRoom(Number(draft.seconds));
    seconds.value = draft.seconds;
    tags = draft.tags;
    setOrigin(draft.origin ?? null);
  } catch {
    // there is no draft
  }
}

function makeRoom(wanted) {
  longest = Math.max(LONGEST, wanted);
  seconds.max = longest;
}

async function measure() {
  const turn = ++measured;
  let said = "";
  try {
    const { continue_from } = originFields();
    const answer = await post("/api/fit", { ...words(), tags: tags.join(","), continue_from });
    const most = answer.longest_ms;
    const problem = trouble(answer, seconds.value * 1000);
    said = problem || `Up to ${length(most)} fit.`;
    if (most >= seconds.value * 1000) seconds.max = Math.max(seconds.min, Math.min(longest, Math.floor(most / 1000)));
    if (turn === measured) fit.classList.toggle("bad", Boolean(problem));
  } catch (error) {
    // otherwise the request for the song will be refused with a text
    if (error.status === 429 && turn === measured) measuring = setTimeout(measure, 2 * FIT_AFTER);
    if (error.field?.startsWith("continue_from")) said = error.message;
    if (turn === measured) fit.classList.toggle("bad", Boolean(said));
  }
  if (turn === measured) fit.textContent = said;
}

/** Why a song of `wanted` ms does not fit; "" if it does. `answer` is that of /api/fit. */
function trouble(answer, wanted) {
  const { longest_ms: most, kept_ms: kept = 0, latest_at_ms: latest = kept } = answer;
  if (most <= 0) return "These lyrics are too long: shorten them.";
  if (kept > latest) return `Beside these lyrics, at most ${exact(latest)} can be kept.`;
  if (most < wanted) return `Only ${length(most)} fit beside these lyrics.`;
  return kept && wanted <= kept ? `The song keeps ${exact(kept)}: make it longer than that.` : "";
}

/** The content of the form as the API takes it, without the fields that are empty. */
function request() {
  takeEntry();
  const values = Object.fromEntries(new FormData(form));
  const body = {
    ...words(),
    tags: tags.join(","),
    max_duration_ms: seconds.value * 1000,
    format: values.format,
    priority: values.priority,
  };
  if (values.title.trim()) body.title = values.title.trim();
  if (values.variants !== "1") body.variants = Number(values.variants);
  for (const name of NUMBERS) {
    if (form.elements[name].validity.badInput) throw new Refused(0, "Give a number.", name); // read as empty otherwise
    if (values[name] !== "") body[name] = Number(values[name]);
  }
  if (later.validity.badInput) throw new Refused(0, "Give a date and a time.", "not_before");
  if (later.value) body.not_before = new Date(later.value).toISOString();
  return { ...body, ...originFields() };
}

function clearErrors() {
  for (const text of form.querySelectorAll(".error")) text.hidden = true;
  for (const input of form.elements) input.removeAttribute("aria-invalid");
}

function showError(error) {
  const field = error.field.split(".")[0]; // continue_from has fields of its own
  const id = { tags: "tag-entry", max_duration_ms: "seconds", continue_from: "moment" }[field] ?? field;
  const input = id ? form.querySelector(`#${CSS.escape(id)}`) : null;
  const text = document.getElementById(input ? `${field}-error` : "form-error");
  text.textContent = error.message;
  text.hidden = false;
  if (input) {
    if (document.querySelector("#advanced").contains(input)) document.querySelector("#advanced").open = true;
    input.setAttribute("aria-invalid", "true");
    input.focus();
  }
}

/** Fill the form with the settings of another song, whose own origin is called `name`. */
export function reuse(wanted, name) {
  const from = wanted.continue_from;
  setOrigin(from ? { ...from, name, min_new_ms: wanted.min_new_ms } : null);
  fill(wanted, wanted.max_duration_ms / 1000);
  document.querySelector("#advanced").open = true; // the seed is there: with it, the song comes out the same
}

/** Fill the form so that it asks for a song that begins as another one, `{id, name, request}`, up to a moment. */
export function extend({ id, name, request: wanted }, at_ms) {
  setOrigin({ job_id: id, name, at_ms });
  // With the seed of the other song, it would go on as that one does.
  fill({ ...wanted, seed: null }, Math.max(wanted.max_duration_ms / 1000, lengthBeside(at_ms)));
}

/** Begin the song that the form asks for as a recording `{recording_id, name, at_ms}`. What it asks for stays. */
export function begin(recording) {
  setOrigin(recording);
  const wanted = Math.max(Number(seconds.value), lengthBeside(recording.at_ms));
  makeRoom(wanted);
  seconds.value = wanted;
  clearErrors();
  changed();
  document.querySelector("#moment").focus();
  form.scrollIntoView({ block: "start" });
}

/** A recording is ready, which may be what the form begins as: what fits can be said now. */
export function ready() {
  changed();
}

function fill(wanted, length) {
  lyrics.value = wanted.lyrics;
  instrumental.checked = Boolean(wanted.instrumental);
  later.value = "";
  makeRoom(length);
  seconds.value = Math.round(length);
  for (const name of ["title", "format", "priority", ...NUMBERS]) form.elements[name].value = wanted[name] ?? "";
  setTags(wanted.tags.split(","));
  clearErrors();
  lyrics.focus();
  form.scrollIntoView({ block: "start" });
}

/** Set up the form; `taken` is called once a song is in the queue. */
export function compose(taken) {
  recall();
  suggest();
  for (const chip of document.querySelectorAll("#sections .chip")) chip.onclick = () => insert(chip.textContent);
  setTags(tags);
  lyrics.oninput = seconds.oninput = changed;
  instrumental.onchange = () => setTags(tags.filter((tag) => tag !== WORDLESS || instrumental.checked));
  form.elements.title.oninput = keep;
  continuation(changed);
  lyrics.onscroll = () => (behind.scrollTop = lyrics.scrollTop);
  entry.onkeydown = (event) => {
    if (event.key === "Enter" || event.key === ",") {
      event.preventDefault();
      takeEntry();
    } else if (event.key === "Backspace" && entry.value === "") setTags(tags.slice(0, -1));
  };
  entry.onblur = takeEntry;
  form.onsubmit = async (event) => {
    event.preventDefault();
    clearErrors();
    const submit = form.querySelector("button[type=submit]");
    submit.disabled = true;
    try {
      await post("/generate", request());
      later.value = ""; // it was for that song
      taken();
    } catch (error) {
      showError(error);
    } finally {
      submit.disabled = false;
    }
  };
}
