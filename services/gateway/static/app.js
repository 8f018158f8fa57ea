// Puts the parts of the page together, and says when the server does not answer or asks for a key.

import { ask, onConnection } from "./api.js";
import { begin, compose, extend, ready, reuse } from "./composer.js";
import { begun, beside, branch, library, look, mark } from "./library.js";
import { player } from "./player.js";
import { showSystem } from "./system.js";
import { upload } from "./upload.js";

const LOOK_EVERY = 5_000; // ms
const ONE_COLUMN = matchMedia("(max-width: 52rem)"); // as in style.css
const banner = document.querySelector("#banner");
const door = document.querySelector("#door");

onConnection((state) => {
  if (state === "key") {
    door.hidden = false;
    document.querySelector("main").hidden = true;
    return;
  }
  const words = state ? "" : "The server does not answer. This page goes on by itself when it is back.";
  if (banner.textContent !== words) banner.textContent = words;
  banner.hidden = state;
});

door.onsubmit = async (event) => {
  event.preventDefault();
  const error = document.querySelector("#key-error");
  error.hidden = true;
  try {
    const headers = { Authorization: `Bearer ${document.querySelector("#key").value.trim()}` };
    await ask("/api/session", { method: "POST", headers });
    door.hidden = true;
    document.querySelector("main").hidden = false;
    look();
    showSystem();
  } catch (refused) {
    error.textContent = refused.status === 401 ? "This key is not known." : refused.message;
    error.hidden = false;
  }
};

window.addEventListener("online", look);
player(beside, mark, branch);
compose(() => {
  look();
  const title = document.querySelector("#library-title");
  // The new song is far below the form, or above the visible part of a long list.
  title.scrollIntoView({ block: ONE_COLUMN.matches ? "start" : "nearest" });
});
upload(begun);
library({ begin, extend, ready, reuse });
showSystem();
setInterval(() => document.hidden || showSystem(), LOOK_EVERY);
