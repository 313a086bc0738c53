// Keeps an open page live: its own address, asked for events, sends the main part anew whenever it has changed.
"use strict";

(() => {
  const main = document.getElementById("main");
  const connection = document.getElementById("connection");
  let source = null;
  let patience = 0;

  function say(state, text) {
    connection.dataset.state = state;
    connection.textContent = text;
  }

  // Touches only what is different, so that focus, scrolling and opened details stay as they are.
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
        beforeAttributeUpdated: (name, node) => !(name === "open" && node.localName === "details"),
      },
    });
    Charts.draw(main);
  }

  function open() {
    if (source || document.hidden) return;
    say("still", "Connecting …");
    source = new EventSource(location.href);
    source.addEventListener("changed", ({ data }) => {
      const end = data.indexOf("\n");
      show(data.slice(end + 1));
      say("live", `Live: as of ${data.slice(0, end)}`);
    });
    source.addEventListener("unchanged", ({ data }) => say("live", `Live: as of ${data}`));
    source.addEventListener("trouble", ({ data }) => say("trouble", `Standing still: ${data}`));
    source.onerror = () => {
      say("trouble", "Standing still: no connection, trying again");
      // The browser tries again by itself, unless the answer was a refusal.
      if (source.readyState === EventSource.CLOSED) {
        close();
        clearTimeout(patience);
        patience = setTimeout(open, 10_000);
      }
    };
  }

  function close() {
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
