// Keeps an open page live: its own address, asked for events, sends the main part anew whenever it has changed.
"use strict";

(() => {
  // The server says something every 2 s, and every 8 s where a question takes long: after this nobody is there any more.
  const SILENCE_MS = 20_000;
  const REFUSED_MS = 10_000;
  const FULL_MS = 30_000;
  const main = document.getElementById("main");
  const connection = document.getElementById("connection");
  const heard = document.getElementById("heard");
  let source = null;
  let timer = 0;
  let asOf = "";

  function say(state, text) {
    // Only what turns live or still is read aloud, not each moment.
    if (state !== "still" && connection.dataset.state !== state) {
      heard.textContent = state === "live" ? "This page is live." : text;
    }
    connection.dataset.state = state;
    connection.textContent = text;
  }

  function live(moment) {
    asOf = moment;
    say("live", `Live: as of ${moment}`);
    expect();
  }

  function standing(reason) {
    say("trouble", `Standing still${asOf && ` since ${asOf}`}: ${reason}`);
  }

  function expect() {
    clearTimeout(timer);
    timer = setTimeout(() => {
      standing("nothing comes any more, trying again");
      close();
      open();
    }, SILENCE_MS);
  }

  function later(wait) {
    close();
    timer = setTimeout(open, wait);
  }

  // Touches only what is different, so that focus, scrolling and zoomed charts stay as they are.
  function show(html) {
    Idiomorph.morph(main, html, {
      morphStyle: "innerHTML",
      callbacks: {
        // The inside of charts is drawn; and forms stay as somebody has begun to fill them in.
        beforeNodeMorphed: (node, wanted) => {
          if (!(node instanceof Element)) return true;
          if (node.classList.contains("plot")) node.ariaLabel = wanted.ariaLabel;
          return !node.matches(".plot, form");
        },
      },
    });
    Charts.draw(main);
  }

  function open() {
    if (source || document.hidden) return;
    if (connection.dataset.state !== "trouble") say("still", "Connecting …");
    expect();
    source = new EventSource(location.href);
    source.addEventListener("changed", ({ data }) => {
      const end = data.indexOf("\n");
      show(data.slice(end + 1));
      live(data.slice(0, end));
    });
    source.addEventListener("unchanged", ({ data }) => live(data));
    source.addEventListener("waiting", expect);
    source.addEventListener("trouble", ({ data }) => {
      standing(data);
      expect();
    });
    source.addEventListener("full", ({ data }) => {
      standing(data);
      later(FULL_MS);
    });
    source.onerror = () => {
      standing("no connection, trying again");
      // The browser tries again by itself, unless the answer was a refusal.
      if (source.readyState === EventSource.CLOSED) later(REFUSED_MS);
    };
  }

  function close() {
    clearTimeout(timer);
    source?.close();
    source = null;
  }

  // A browser has few connections to one place, and a page that nobody sees needs none.
  function turn() {
    if (document.hidden) close();
    else open();
  }

  document.addEventListener("visibilitychange", turn);
  addEventListener("pagehide", close);
  addEventListener("pageshow", turn);
  Charts.draw(main);
  turn();
})();
