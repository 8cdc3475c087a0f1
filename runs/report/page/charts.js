// Charts: one card a panel, drawn by uPlot when it comes into view; one cursor for all of them.

const SYNC = uPlot.sync("steps");
const charts = [];
let smoothing = 0;

/** All charts show the same steps; a drag shows fewer, a double click all of them again. */
const STEPS = (() => {
  const ends = runs.flatMap((run) => run.axes.flatMap((axis) => [axis[0], axis.at(-1)]));
  const min = Math.min(...ends),
    max = Math.max(...ends);
  return { min, max: max > min ? max : min + 1 };
})();

/** Trailing mean over `width` values that are there. */
function smoothed(values, width) {
  if (!width) return values;
  const recent = [];
  let sum = 0;
  return values.map((value) => {
    if (value === null) return null;
    recent.push(value);
    sum += value;
    if (recent.length > width) sum -= recent.shift();
    return sum / recent.length;
  });
}

/** The values of some lines over the union of their steps. */
function aligned(lines) {
  const steps = [...new Set(lines.flatMap((line) => line.steps))].sort((a, b) => a - b);
  const place = new Map(steps.map((step, i) => [step, i]));
  const columns = lines.map((line) => {
    const column = new Array(steps.length).fill(null);
    line.steps.forEach((step, i) => {
      column[place.get(step)] = line.values[i];
    });
    return column;
  });
  return [steps, columns];
}

/** The lines of a panel: one for each run and key that it has. Runs differ by colour, keys by dash. */
function linesOf(panel, shownRuns) {
  const lines = [];
  shownRuns.forEach((run) =>
    panel.lines.forEach(([key, label], k) => {
      const found = run.series[key];
      if (!found) return;
      const r = runs.indexOf(run);
      const overlay = severalRuns && panel.kind !== "stack";
      const name = overlay ? (panel.lines.length > 1 ? `${run.name}: ${label}` : run.name) : label;
      lines.push({
        name,
        steps: run.axes[found[0]],
        values: found[1],
        colour: overlay ? r : k,
        dash: overlay && panel.lines.length > 1 ? k : overlay ? r : k,
      });
    }),
  );
  return lines;
}

class Chart {
  constructor(panel, shownRuns) {
    this.panel = panel;
    this.lines = linesOf(panel, shownRuns);
    this.hidden = new Set();
    this.drawn = null;
    this.legend = h("div", { class: "legend" });
    this.plot = h("div", {
      class: "plot",
      tabindex: "0",
      role: "img",
      "aria-label": `${panel.title}${panel.unit ? ` in ${panel.unit}` : ""} over steps. Left and right arrow keys read the values.`,
      onkeydown: (event) => this.key(event),
      onblur: () => this.leave(),
    });
    const numbers = h(
      "details",
      { class: "numbers", ontoggle: () => this.fillNumbers(numbers) },
      h("summary", {}, "Numbers"),
    );
    const suffix = panel.kind === "stack" && severalRuns ? ` \u00b7 ${shownRuns[0].name}` : "";
    this.remark = h("p", { class: "note" });
    this.element = h(
      "figure",
      { class: "card chart", "data-panel": panel.title },
      h(
        "figcaption",
        {},
        h("span", { class: "title" }, panel.title + suffix),
        panel.unit && h("span", { class: "unit" }, panel.unit),
      ),
      panel.note && h("p", { class: "note" }, panel.note),
      this.legend,
      this.remark,
      this.plot,
      numbers,
    );
    this.makeLegend();
    new IntersectionObserver(
      (entries) => {
        if (entries.some((e) => e.isIntersecting) && !this.drawn) this.draw();
      },
      { rootMargin: "800px" },
    ).observe(this.plot);
    new ResizeObserver(() => {
      if (this.drawn) this.drawn.setSize(this.size());
    }).observe(this.plot);
    charts.push(this);
  }

  size() {
    return { width: Math.max(200, Math.floor(this.plot.clientWidth)), height: 210 };
  }

  makeLegend() {
    this.outputs = [];
    fill(
      this.legend,
      this.lines.map((line, i) => {
        const output = h("span", { class: "value" });
        this.outputs.push(output);
        const sample = document.createElementNS("http://www.w3.org/2000/svg", "svg");
        sample.setAttribute("viewBox", "0 0 26 8");
        sample.setAttribute("class", "sample");
        const stroke = document.createElementNS(
          "http://www.w3.org/2000/svg",
          this.panel.kind === "stack" ? "rect" : "line",
        );
        const shape =
          this.panel.kind === "stack"
            ? { width: 26, height: 8, rx: 2, fill: colour(line.colour) }
            : {
                x1: 0,
                x2: 26,
                y1: 4,
                y2: 4,
                stroke: colour(line.colour),
                "stroke-width": 2.5,
                "stroke-dasharray": DASHES[line.dash % DASHES.length].join(" "),
              };
        Object.entries(shape).forEach(([name, value]) => stroke.setAttribute(name, value));
        sample.append(stroke);
        return h(
          "button",
          {
            type: "button",
            "aria-pressed": String(!this.hidden.has(i)),
            title: "Show or hide",
            onclick: () => {
              this.hidden.has(i) ? this.hidden.delete(i) : this.hidden.add(i);
              this.makeLegend();
              this.draw();
            },
          },
          sample,
          h("span", { class: "name" }, visible(line.name)),
          output,
        );
      }),
    );
    this.showValues(null);
  }

  /** Values at a place of the cursor, or the last ones. */
  showValues(place) {
    if (!this.columns) [this.steps, this.columns] = aligned(this.lines);
    this.columns.forEach((column, i) => {
      const at = place === null ? column.findLastIndex((value) => value !== null) : place;
      this.outputs[i].textContent = at < 0 ? "\u2013" : shown(column[at]);
    });
    this.legend.dataset.step = place === null ? "" : this.steps[place];
  }

  draw() {
    if (this.drawn) this.drawn.destroy();
    [this.steps, this.columns] = aligned(this.lines);
    const visibleColumns = this.columns.map((column, i) => (this.hidden.has(i) ? column.map(() => null) : column));
    const plotted = this.panel.kind === "stack" ? this.stacked(visibleColumns) : this.overlaid(visibleColumns);
    const axis = {
      stroke: styleOf("--faint"),
      font: "11px system-ui, sans-serif",
      grid: { stroke: styleOf("--grid"), width: 1 },
      ticks: { stroke: styleOf("--grid"), width: 1, size: 4 },
    };
    const integers = (u, splits) => splits.map((v) => (Number.isInteger(v) ? v.toLocaleString("en-US") : ""));
    this.drawn = new uPlot(
      {
        ...this.size(),
        legend: { show: false },
        cursor: { sync: { key: SYNC.key, setSeries: false }, points: { size: 6 }, drag: { x: true, y: false } },
        scales: {
          x: { time: false, range: (u, min, max) => this.stepRange(min, max) },
          y: { range: (u, min, max) => this.range(min, max) },
        },
        axes: [
          { ...axis, values: integers, size: 26, gap: 3 },
          { ...axis, size: 46, gap: 3, values: (u, splits) => splits.map((v) => tick(v, splits)) },
        ],
        series: [{}, ...plotted.series],
        bands: plotted.bands,
        hooks: { setCursor: [(u) => this.showValues(u.cursor.idx ?? null)] },
      },
      [this.steps, ...plotted.columns],
      this.plot,
    );
  }

  /** All steps of the report, unless a part of them was chosen. */
  stepRange(min, max) {
    return min === this.steps[0] && max === this.steps.at(-1) ? [STEPS.min, STEPS.max] : [min, max];
  }

  range(min, max) {
    if (min === null || max === null) return [0, 1];
    if (this.panel.kind === "stack") return [0, (this.top ?? max) * 1.05 || 1];
    if (this.panel.unit === "share" && min >= 0) return [0, max > 0.5 ? Math.max(1.02, max) : max * 1.1 || 0.1];
    const pad = (max - min) * 0.08 || Math.abs(max) * 0.1 || 1;
    return [min >= 0 && min < 0.4 * max ? 0 : min - pad, max + pad];
  }

  /** With smoothing each line twice: as it is, faint, and its mean. */
  overlaid(columns) {
    const series = [],
      plotted = [];
    columns.forEach((column, i) => {
      const line = this.lines[i];
      const isSparse = column.filter((value) => value !== null).length <= 40;
      const style = {
        stroke: colour(line.colour),
        width: 1.8,
        dash: DASHES[line.dash % DASHES.length],
        spanGaps: true,
        points: { show: isSparse, size: 5, fill: colour(line.colour) },
      };
      if (smoothing && !isSparse) {
        series.push({ ...style, width: 1, dash: [], alpha: 0.28, points: { show: false } });
        plotted.push(column);
      }
      series.push(style);
      plotted.push(isSparse ? column : smoothed(column, smoothing));
    });
    return { series, columns: plotted, bands: [] };
  }

  /** Areas on top of each other; where a phase has no value it took no time. */
  stacked(columns) {
    const sums = new Array(this.steps.length).fill(0);
    const plotted = columns.map((column) => {
      const mean = smoothing
        ? smoothed(
            column.map((v) => v ?? 0),
            smoothing,
          )
        : column;
      mean.forEach((value, i) => {
        sums[i] += value ?? 0;
      });
      return [...sums];
    });
    const sorted = [...sums].sort((a, b) => a - b),
      most = sorted[Math.floor(0.95 * (sorted.length - 1))];
    this.top = sorted.at(-1) > 3 * most ? 1.5 * most : undefined;
    this.remark.textContent = this.top ? "Higher peaks are cut off here; they are among the numbers." : "";
    const series = plotted.map((_, i) => ({
      stroke: colour(this.lines[i].colour),
      width: 1,
      fill: i ? undefined : `${colour(this.lines[i].colour)}cc`,
      points: { show: false },
    }));
    const bands = plotted
      .slice(1)
      .map((_, i) => ({ series: [i + 2, i + 1], fill: `${colour(this.lines[i + 1].colour)}cc` }));
    return { series, columns: plotted, bands };
  }

  key(event) {
    const moves = { ArrowLeft: -1, ArrowRight: 1, PageUp: -10, PageDown: 10, Home: -Infinity, End: Infinity };
    if (!(event.key in moves) || !this.drawn) return;
    event.preventDefault();
    const last = this.steps.length - 1;
    this.place = Math.max(0, Math.min(last, (this.place ?? (moves[event.key] > 0 ? -1 : last + 1)) + moves[event.key]));
    this.drawn.setCursor({ left: this.drawn.valToPos(this.steps[this.place], "x"), top: 10 });
    this.showValues(this.place);
    say(
      `step ${this.steps[this.place]}: ` +
        this.lines.map((line, i) => `${line.name} ${shown(this.columns[i][this.place])}`).join(", "),
    );
  }

  leave() {
    this.place = undefined;
    if (this.drawn) this.drawn.setCursor({ left: -10, top: -10 });
  }

  fillNumbers(details) {
    if (!details.open || details.querySelector("table")) return;
    const rows = this.steps.map((step, i) => [step, ...this.columns.map((column) => shown(column[i]))]);
    const most = 500;
    details.append(
      table(["step", ...this.lines.map((line) => visible(line.name))], rows.slice(-most), {
        label: this.panel.title,
        class: "narrow",
      }),
    );
    if (rows.length > most)
      details.append(h("p", { class: "note" }, `The last ${most} of ${rows.length} rows; all are in metrics.jsonl.`));
  }
}

function tick(value, splits) {
  const step = Math.abs(splits[1] - splits[0]) || 1;
  const size = Math.max(...splits.map(Math.abs));
  if (size >= 1e5 || size < 1e-3)
    return value === 0
      ? "0"
      : value
          .toExponential(step < size / 20 ? 1 : 0)
          .replace("e+", "e")
          .replace("-", MINUS);
  const digits = [0, 1, 2, 3, 4, 5].find((d) => Math.abs(step * 10 ** d - Math.round(step * 10 ** d)) < 1e-6) ?? 5;
  return value.toFixed(digits).replace("-", MINUS);
}

onTheme.push(() =>
  charts.forEach((chart) => {
    chart.makeLegend();
    if (chart.drawn) chart.draw();
  }),
);
addEventListener("beforeprint", () =>
  charts.forEach((chart) => {
    if (!chart.drawn) chart.draw();
  }),
);

/** Cards of a section; a stack of several runs is a card for each. */
function chartCards(section) {
  return data.panels
    .filter((panel) => panel.section === section)
    .flatMap((panel) =>
      (panel.kind === "stack" ? runs.map((run) => new Chart(panel, [run])) : [new Chart(panel, runs)])
        .filter((chart) => chart.lines.length)
        .map((chart) => chart.element),
    );
}

/** Horizontal bars: measured peak of each phase, with a mark where the plan predicts it. */
function memoryCard(run) {
  const kind = run.memory.some((m) => m.reserved !== undefined) ? "reserved" : "rss";
  const most = Math.max(...run.memory.flatMap((m) => [m.predicted ?? 0, m[kind] ?? 0, m.driver ?? 0])) || 1;
  const share = (element, value) => {
    element.style.width = `${(100 * (value ?? 0)) / most}%`;
    return element;
  };
  const place = (element, value) => {
    element.style.left = `${(100 * (value ?? 0)) / most}%`;
    return element;
  };
  return h(
    "figure",
    { class: "card memory" },
    h(
      "figcaption",
      {},
      h("span", { class: "title" }, "Peak memory by phase" + (severalRuns ? ` \u00b7 ${run.name}` : "")),
      h("span", { class: "unit" }, "GB"),
    ),
    h(
      "p",
      { class: "note" },
      kind === "rss"
        ? "Bars: resident memory of the process, for want of a GPU. Marks: predicted for a GPU."
        : "Bars: reserved on the GPU. Marks: predicted. In brackets: what the driver counts.",
    ),
    h(
      "div",
      { class: "bars" },
      run.memory.map((m) => [
        h("span", { class: "label" }, m.phase),
        h(
          "span",
          { class: "track" },
          share(h("span", { class: "bar" }), m[kind]),
          place(h("span", { class: "mark" }), m.predicted),
        ),
        h(
          "span",
          { class: "amount" },
          `${shown(m[kind])} of ${shown(m.predicted)}`,
          m.driver !== undefined && ` (${shown(m.driver)})`,
        ),
      ]),
    ),
  );
}

/** One bar for the seconds of the whole run, by phase. */
function timeCard(run) {
  const phases = Object.entries(run.seconds);
  const total = phases.reduce((sum, [, seconds]) => sum + seconds, 0) || 1;
  return h(
    "figure",
    { class: "card time" },
    h(
      "figcaption",
      {},
      h("span", { class: "title" }, "Where the time went" + (severalRuns ? ` \u00b7 ${run.name}` : "")),
      h("span", { class: "unit" }, duration(total)),
    ),
    h(
      "div",
      { class: "whole" },
      phases.map(([phase, seconds], i) => {
        const part = painted(h("span", { class: "part", title: phase }), i);
        part.style.width = `${(100 * seconds) / total}%`;
        return part;
      }),
    ),
    h(
      "ul",
      { class: "parts" },
      phases.map(([phase, seconds], i) =>
        h(
          "li",
          {},
          painted(h("span", { class: "key" }), i),
          h("b", {}, phase),
          ` ${duration(seconds)} \u00b7 ${Math.round((100 * seconds) / total)} %`,
        ),
      ),
    ),
  );
}
