// Draws the figures of class "chart" with uPlot, from the JSON in them; draws again what has changed.
"use strict";

const Charts = (() => {
  const HEIGHT = 190;
  const drawn = new Map();
  const DAY = 86_400;
  // Between ticks, in seconds: no less, as less could not be told apart.
  const STEPS = [1, 5, 15, 30, 60, 300, 900, 1_800, 3_600, 10_800, 21_600, 43_200, ...[1, 2, 5, 10, 30, 90, 365].map((days) => days * DAY)];

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
    const [first] = data.series;
    const scales = { x: { time: true }, y: { range: data.range ?? ((_, low, high) => padded(low, high, first)) } };
    const axes = [
      { stroke: ink, grid, ticks: grid, space: 64, incrs: STEPS, values: (_u, splits, _axis, _space, step) => splits.map((at) => tick(at, step)) },
      {
        stroke: ink,
        grid,
        ticks: grid,
        size: (_, values) => 18 + 7 * Math.max(0, ...(values ?? []).map((value) => value.length)),
        values: (_, splits) => splits.map((split) => figures(split) + (first.unit ? ` ${first.unit}` : "")),
      },
    ];
    const series = [{ label: "UTC", value: (_, at) => (at == null ? "—" : moment(at, at % 60 ? 19 : 16)) }];
    data.series.forEach((one, index) => {
      const stroke = colour(`--chart-${index + 1}`);
      const bars = one.kind === "bars";
      series.push({
        label: one.label,
        stroke,
        width: bars ? 1 : 1.6,
        fill: bars || one.kind === "area" ? `color-mix(in srgb, ${stroke} 28%, transparent)` : undefined,
        paths: bars ? uPlot.paths.bars({ size: [0.8, 40] }) : one.kind === "steps" ? uPlot.paths.stepped({ align: 1 }) : undefined,
        points: { size: 5 },
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

  // The hour, with seconds where they tell ticks apart; at midnight the day.
  function tick(seconds, step) {
    const text = moment(seconds, step < 60 ? 19 : 16);
    return text.endsWith(" 00:00") ? text.slice(5, 10) : text.slice(11);
  }

  // So much of it: 16 characters end with the minute, 19 with the second.
  function moment(seconds, length) {
    return new Date(seconds * 1e3).toISOString().slice(0, length).replace("T", " ");
  }

  // What somebody has zoomed in on stays, as long as there is something of it.
  function renew(chart, columns) {
    const { min, max } = chart.scales.x;
    const [before] = chart.data;
    const [times] = columns;
    if ((min > before[0] || max < before.at(-1)) && max > times[0] && min < times.at(-1)) {
      chart.setData(columns, false);
      // Draws, and fits the other axis.
      chart.setScale("x", { min, max });
    } else {
      chart.setData(columns);
    }
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
      const shape = JSON.stringify(data.series.map(({ label, unit, kind }) => [label, unit, kind]));
      if (before?.shape === shape) {
        renew(before.chart, columns);
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

  // Colours are those of the theme at the time of drawing; paper is light.
  for (const theme of ["(prefers-color-scheme: dark)", "print"]) {
    matchMedia(theme).addEventListener("change", () => {
      for (const entry of drawn.values()) entry.text = entry.shape = "";
      draw(document);
    });
  }

  return { draw };
})();
