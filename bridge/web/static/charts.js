// Draws the figures of class "chart" with uPlot, from the JSON in them; draws again what has changed.
"use strict";

const Charts = (() => {
  const HEIGHT = 190;
  const drawn = new Map();
  const pad = (number) => String(number).padStart(2, "0");

  // What the theme makes of it: a canvas does not know the colours of style sheets by name.
  function colour(name) {
    const probe = document.body.appendChild(document.createElement("i"));
    probe.style.color = `var(${name})`;
    const found = getComputedStyle(probe).color;
    probe.remove();
    return found;
  }

  function figures(value) {
    return value == null ? "—" : value.toLocaleString("en", { maximumFractionDigits: Math.abs(value) < 10 ? 3 : 1 });
  }

  function options(data, width) {
    const ink = colour("--ink-2");
    const grid = { stroke: colour("--line"), width: 1 };
    const scales = { x: { time: true } };
    const axes = [{ stroke: ink, grid, ticks: grid, space: 64, values: (_, splits) => splits.map(tick) }];
    const series = [{ label: "UTC", value: (_, at) => (at == null ? "—" : moment(at)) }];
    data.series.forEach((one, index) => {
      const scale = one.scale ?? "y";
      const stroke = colour(`--chart-${index + 1}`);
      if (!(scale in scales)) {
        const right = scale !== "y";
        scales[scale] = data.range && !right ? { range: data.range } : { range: (_, low, high) => padded(low, high, one) };
        axes.push({
          scale,
          side: right ? 1 : 3,
          stroke: ink,
          grid: right ? { show: false } : grid,
          ticks: grid,
          size: (_, values) => 18 + 7 * Math.max(0, ...(values ?? []).map((value) => value.length)),
          values: (_, splits) => splits.map((split) => figures(split) + (one.unit ? ` ${one.unit}` : "")),
        });
      }
      const bars = one.kind === "bars";
      series.push({
        label: one.label,
        scale,
        stroke,
        width: bars ? 1 : 1.6,
        fill: bars || one.kind === "area" ? `color-mix(in srgb, ${stroke} 28%, transparent)` : undefined,
        paths: bars ? uPlot.paths.bars({ size: [0.8, 40] }) : one.kind === "steps" ? uPlot.paths.stepped({ align: 1 }) : undefined,
        points: { show: one.kind === "points" ? true : undefined, size: 5 },
        spanGaps: false,
        value: (_, value) => (value == null ? "—" : `${figures(value)} ${one.unit ?? ""}`),
      });
    });
    return {
      width,
      height: HEIGHT,
      scales,
      axes,
      series,
      tzDate: (seconds) => uPlot.tzDate(new Date(seconds * 1e3), "UTC"),
      cursor: { sync: { key: "page" }, drag: { x: true, y: false } },
      legend: { live: true },
    };
  }

  // From zero where values are amounts; a flat line stands in the middle.
  function padded(low, high, one) {
    if (low == null) return [0, 1];
    const bottom = one.kind === "bars" || one.kind === "area" ? Math.min(0, low) : low;
    const room = (high - bottom || Math.abs(high) || 1) * 0.08;
    return [bottom === 0 ? 0 : bottom - room, high + room];
  }

  // The hour; at midnight the day.
  function tick(seconds) {
    const text = moment(seconds);
    return text.endsWith("00:00") ? text.slice(5, 10) : text.slice(11);
  }

  function moment(seconds) {
    const at = new Date(seconds * 1e3);
    const day = `${at.getUTCFullYear()}-${pad(at.getUTCMonth() + 1)}-${pad(at.getUTCDate())}`;
    return `${day} ${pad(at.getUTCHours())}:${pad(at.getUTCMinutes())}`;
  }

  const observer = new ResizeObserver((entries) => {
    for (const { target, contentRect } of entries) {
      drawn.get(target)?.chart.setSize({ width: Math.floor(contentRect.width), height: HEIGHT });
    }
  });

  function draw(root) {
    for (const [plot, { chart }] of drawn) {
      if (!plot.isConnected) {
        observer.unobserve(plot);
        chart.destroy();
        drawn.delete(plot);
      }
    }
    for (const figure of root.querySelectorAll("figure.chart")) {
      const plot = figure.querySelector(".plot");
      const text = figure.querySelector("script").textContent;
      const before = drawn.get(plot);
      if (before?.text === text) continue;
      const data = JSON.parse(text);
      const columns = [data.x, ...data.series.map((one) => one.values)];
      const shape = JSON.stringify(data.series.map(({ label, unit, kind, scale }) => [label, unit, kind, scale]));
      if (before?.shape === shape) {
        before.chart.setData(columns);
        before.text = text;
        continue;
      }
      before?.chart.destroy();
      plot.replaceChildren();
      const chart = new uPlot(options(data, Math.max(200, Math.floor(plot.clientWidth))), columns, plot);
      drawn.set(plot, { chart, text, shape });
      observer.observe(plot);
    }
  }

  // Colours are those of the theme at the time of drawing.
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    for (const entry of drawn.values()) entry.text = entry.shape = "";
    draw(document);
  });

  return { draw };
})();
