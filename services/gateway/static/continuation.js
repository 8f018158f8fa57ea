// The part of the form that says what a song begins as: another song, or a recording, up to a moment of it.

import { Refused } from "./api.js";
import { exact, milliseconds } from "./words.js";

export const FRAME = 80; // ms; a song is kept up to a whole frame
const LEAST_NEW = 30; // seconds that are offered beside what is kept
const box = document.querySelector("#origin");
const moment = document.querySelector("#moment");
const least = document.querySelector("#min_new_ms");
const heading = document.querySelector("#compose-title");
let source = null; // {job_id or recording_id, name}

/** Begin as a song or a recording `{job_id or recording_id, name, at_ms, min_new_ms}`; null: begin anew. */
export function setOrigin(wanted) {
  source = wanted && { job_id: wanted.job_id, recording_id: wanted.recording_id, name: wanted.name };
  box.hidden = document.querySelector("#least").hidden = !source;
  heading.textContent = source ? "A new version" : "A new song";
  box.querySelector("strong").textContent = source ? source.name : "";
  moment.value = wanted?.at_ms == null ? "" : exact(wanted.at_ms);
  least.value = wanted?.min_new_ms == null ? "" : wanted.min_new_ms / 1000;
}

/** What the form begins as, in the form that `setOrigin` takes; null if it begins anew. */
export function origin() {
  if (!source) return null;
  const least_ms = least.value === "" ? null : Math.round(Number(least.value) * 1000);
  return { ...source, at_ms: milliseconds(moment.value), min_new_ms: least_ms };
}

/** The fields of a request that say it; none if the song begins anew. Throws `Refused` for what is no moment. */
export function originFields() {
  const found = origin();
  if (!found) return {};
  const { job_id, recording_id, at_ms, min_new_ms } = found;
  if (moment.value.trim() && at_ms === null) throw new Refused(0, "Give a moment such as 1:04.", "continue_from");
  if (at_ms !== null && at_ms < FRAME) throw new Refused(0, "Keep some of it, or begin anew.", "continue_from");
  if (least.validity.badInput) throw new Refused(0, "Give a number.", "min_new_ms");
  const fields = { continue_from: { job_id, recording_id, at_ms: at_ms ?? undefined } }; // undefined is left out of JSON
  if (min_new_ms !== null) fields.min_new_ms = min_new_ms;
  return fields;
}

/** The longest length that is offered for a song that keeps so much of another one, in seconds. */
export function lengthBeside(at_ms) {
  return Math.ceil((at_ms / 1000 + LEAST_NEW) / 5) * 5;
}

/** `changed` is called when the moment changes, and when the song is to begin anew. */
export function continuation(changed) {
  moment.oninput = least.oninput = changed;
  document.querySelector("#forget").onclick = () => {
    setOrigin(null);
    changed();
    document.querySelector("#lyrics").focus();
  };
}
