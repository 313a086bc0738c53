// Loads a page again once there is an answer: asks in the background, so that nothing is read aloud or moved each time.
"use strict";

(() => {
  const FIRST_MS = 5_000;
  const LONGEST_MS = 60_000;

  async function answered() {
    try {
      return (await fetch(location.href, { headers: { Accept: "text/html" }, cache: "no-store" })).status !== 503;
    } catch {
      return false;
    }
  }

  async function ask(pause) {
    if (await answered()) location.reload();
    else setTimeout(ask, pause, Math.min(2 * pause, LONGEST_MS));
  }

  document.getElementById("again").textContent =
    "This page asks again by itself: in 5 seconds, then less and less often, at last once a minute.";
  setTimeout(ask, FIRST_MS, 2 * FIRST_MS);
})();
