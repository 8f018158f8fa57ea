// The form: lyrics with their sections, tags, length, and all other settings of a song.

import { Refused, post } from "./api.js";

const form = document.querySelector("#compose");
const lyrics = form.elements.lyrics;
const behind = document.querySelector(".behind");
const chosen = document.querySelector("#tags");
const entry = document.querySelector("#tag-entry");
const seconds = document.querySelector("#seconds");
const fit = document.querySelector("#fit");
const LONGEST = Number(seconds.max); // seconds
const NUMBERS = ["temperature", "cfg_scale", "topk", "seed"];
const FIT_AFTER = 500; // ms without a key stroke
const DRAFT = "heartmula-draft"; // keeps what was typed over a reload
const MARK = " ✕"; // behind a chosen tag
let tags = [...chosen.children].map((item) => item.textContent.trim().replace(MARK, ""));
let measuring = 0;
let measured = 0; // the latest answer that was asked for

/** Draw the layer behind the text: a mark under the name of each section. */
function paint() {
  behind.replaceChildren();
  for (const line of lyrics.value.split("\n")) {
    const part = document.createElement(/^\s*\[[^\]]+\]\s*$/.test(line) ? "mark" : "span");
    part.textContent = line;
    behind.append(part, "\n");
  }
  behind.scrollTop = lyrics.scrollTop;
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
  document.querySelector("#seconds-word").textContent = length(seconds.value * 1000);
  clearTimeout(measuring);
  measuring = setTimeout(measure, FIT_AFTER);
  keep();
}

function keep() {
  const draft = { lyrics: lyrics.value, title: form.elements.title.value, tags, seconds: seconds.value };
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
    form.elements.title.value = draft.title;
    seconds.value = draft.seconds;
    tags = draft.tags;
  } catch {
    // there is no draft
  }
}

async function measure() {
  const turn = ++measured;
  let words = "";
  try {
    const answer = await post("/api/fit", { lyrics: lyrics.value, tags: tags.join(",") });
    const longest = answer.longest_ms;
    words = longest <= 0 ? "These lyrics are too long: shorten them." : `Up to ${length(longest)} fit.`;
    const fits = longest >= seconds.value * 1000;
    if (fits) seconds.max = Math.max(seconds.min, Math.min(LONGEST, Math.floor(longest / 1000)));
    fit.classList.toggle("bad", !fits);
    if (longest > 0 && longest < seconds.value * 1000) words = `Only ${length(longest)} fit beside these lyrics.`;
  } catch (error) {
    // otherwise the request for the song will be refused with a text
    if (error.status === 429 && turn === measured) measuring = setTimeout(measure, 2 * FIT_AFTER);
  }
  if (turn === measured) fit.textContent = words;
}

/** The content of the form as the API takes it, without the fields that are empty. */
function request() {
  takeEntry();
  const values = Object.fromEntries(new FormData(form));
  const body = {
    lyrics: values.lyrics,
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
  return body;
}

function clearErrors() {
  for (const text of form.querySelectorAll(".error")) text.hidden = true;
  for (const input of form.elements) input.removeAttribute("aria-invalid");
}

function showError(error) {
  const id = { tags: "tag-entry", max_duration_ms: "seconds" }[error.field] ?? error.field;
  const input = id ? form.querySelector(`#${CSS.escape(id)}`) : null;
  const text = document.getElementById(input ? `${error.field}-error` : "form-error");
  text.textContent = error.message;
  text.hidden = false;
  if (input) {
    if (document.querySelector("#advanced").contains(input)) document.querySelector("#advanced").open = true;
    input.setAttribute("aria-invalid", "true");
    input.focus();
  }
}

/** Fill the form with the settings of another song. */
export function reuse(wanted) {
  lyrics.value = wanted.lyrics;
  seconds.max = LONGEST;
  seconds.value = Math.round(wanted.max_duration_ms / 1000);
  for (const name of ["title", "format", "priority", ...NUMBERS]) form.elements[name].value = wanted[name] ?? "";
  setTags(wanted.tags.split(","));
  clearErrors();
  document.querySelector("#advanced").open = true; // the seed is there: with it, the song comes out the same
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
  form.elements.title.oninput = keep;
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
      taken();
    } catch (error) {
      showError(error);
    } finally {
      submit.disabled = false;
    }
  };
}
