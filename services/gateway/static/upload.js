// The control that uploads a recording: a button, or a file that is dropped on the form.

import { Refused, refusal, reportConnection } from "./api.js";

const form = document.querySelector("#compose");
const pick = document.querySelector("#pick");
const file = document.querySelector("#file");
const sending = document.querySelector("#sending");
const sent = document.querySelector("#sent");
const word = document.querySelector("#sent-word");
const complaint = document.querySelector("#recording-error");
const LONGEST_TITLE = 300;
let request = null; // that is under way

/** The name of a file without its ending, as the title of a recording. */
function titleOf(name) {
  return name.replace(/\.[^.]*$/, "").replace(/\p{C}/gu, "").slice(0, LONGEST_TITLE);
}

/** POST a file; resolves with the recording, or null where it was stopped. `onProgress` gets what share is over. */
function send(wanted, onProgress) {
  return new Promise((resolve, reject) => {
    request = new XMLHttpRequest(); // fetch does not tell how far an upload is
    request.open("POST", `/recordings?title=${encodeURIComponent(titleOf(wanted.name))}`);
    request.setRequestHeader("Content-Type", "application/octet-stream");
    request.responseType = "json";
    request.upload.onprogress = (event) => onProgress(event.loaded / event.total);
    request.onabort = () => resolve(null);
    request.onerror = () => reject(new Refused(0, "The connection broke off. Is the server running, and is the file not too large?"));
    request.onload = () => {
      reportConnection(request.status === 401 ? "key" : true);
      if (request.status < 300) resolve(request.response);
      else reject(refusal(request.status, request.statusText, request.response ?? {}, request.getResponseHeader("Retry-After")));
    };
    request.send(wanted);
  });
}

function show(share) {
  sent.value = share * 100;
  const text = share < 1 ? "Uploading…" : "Reading the file…";
  if (word.textContent !== text) word.textContent = text;
}

function complain(text) {
  complaint.textContent = text;
  complaint.hidden = !text;
}

async function take(wanted, taken) {
  if (!wanted) return;
  if (request) return complain("One file at a time: wait for the first one, or stop it.");
  complain("");
  show(0);
  sending.hidden = false;
  try {
    const recording = await send(wanted, show);
    if (recording) taken(recording);
  } catch (error) {
    complain(error.message);
  }
  request = null;
  sending.hidden = true;
  file.value = ""; // the same file may be chosen again
}

/** Set up the control; `taken(recording)` is called once the service has one. */
export function upload(taken) {
  pick.onclick = () => file.click();
  file.onchange = () => take(file.files[0], taken);
  document.querySelector("#stop").onclick = () => {
    request.abort();
    pick.focus();
  };
  let inside = 0; // a drag enters each part of the form, and leaves it
  const within = (change) => {
    inside = change ? inside + change : 0;
    form.classList.toggle("dropping", inside > 0);
  };
  const files = (event) => event.dataTransfer.types.includes("Files");
  form.ondragenter = (event) => files(event) && within(1);
  form.ondragleave = (event) => files(event) && within(-1);
  form.ondragover = (event) => {
    if (files(event)) event.preventDefault(); // else the browser opens the file
  };
  form.ondrop = (event) => {
    if (!files(event)) return;
    event.preventDefault();
    within(0);
    take(event.dataTransfer.files[0], taken);
  };
}
