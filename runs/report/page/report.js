// The page: head line, key figures, curves, completions, comparison, configuration.

const ICONS = { good: "\u2713", bad: "\u2717", neutral: "\u2248" };

function verdictCard(run, r) {
  const { verdict } = run;
  const state = run.finished ? "finished" : run.step ? "not finished" : "no step yet";
  const list = (title, items, className) =>
    items.length > 0 && [
      h("h3", {}, title),
      h(
        "ul",
        { class: className },
        items.map((text) => h("li", {}, visible(text))),
      ),
    ];
  const name = severalRuns && h("p", { class: "runname" }, runKey(r), quoted(run.name));
  return h(
    "section",
    { class: `verdict card ${verdict.tone}` },
    name,
    h("h2", {}, h("span", { class: "icon", "aria-hidden": "true" }, ICONS[verdict.tone]), verdict.title),
    h("p", { class: "sentence" }, visible(verdict.sentence)),
    h(
      "p",
      { class: "meta" },
      [
        run.method === "rlt" ? "Reinforcement learning teacher" : run.method.replaceAll("_", " "),
        run.model,
        state,
        `step ${run.step}${run.max_steps ? ` of ${run.max_steps}` : ""}`,
      ].map((text) => quoted(text, "part")),
    ),
    list("Look at this", verdict.warnings, "warnings"),
    verdict.warnings.length === 0 &&
      run.step > 0 &&
      h(
        "p",
        { class: "calm" },
        run.method === "rlt"
          ? "No warning: format, KL, leaks, lengths, spread of rewards, clipping, entropy, sampler, memory and finiteness were checked."
          : "No warning: memory, recoveries and finiteness were checked.",
      ),
    list("Missing from this page", run.missing, "missing"),
  );
}

const runKey = (r) => painted(h("span", { class: "runkey" }), r);

function tile(name, figure, unit = "", text = shown) {
  if (!figure || figure.after === null) return null;
  const before = figure.before ?? null;
  return h(
    "div",
    { class: "tile" },
    h("span", { class: "label" }, name),
    h("span", { class: "big" }, text(figure.after), unit && h("span", { class: "unit" }, unit)),
    before !== null && h("span", { class: "from" }, `from ${text(before)}`),
  );
}

function tiles(run) {
  const by = Object.fromEntries(run.figures.map((figure) => [figure.key, figure]));
  const total = Object.values(run.seconds).reduce((sum, s) => sum + s, 0);
  const peak = Math.max(0, ...run.memory.map((m) => m.driver ?? m.reserved ?? m.rss ?? 0));
  return h(
    "div",
    { class: "tiles" },
    tile("Held-out log-prob", by.eval_solution_log_prob, "nats/token"),
    tile("Held-out bound", by.eval_nll_bound, "nats/token"),
    tile("Reward", by.reward),
    by.reward ? null : tile("Loss", by.loss),
    tile("Exact match", by.eval_exact_match, "", percent),
    tile("Format kept", by.eval_format_rate ?? by["rlt/format_rate"], "", percent),
    tile("KL", by["rlt/unprocessed_thought_kl_mean"], "nats/token"),
    tile("Tokens per completion", by["completions/mean_length"]),
    total > 0 &&
      h(
        "div",
        { class: "tile" },
        h("span", { class: "label" }, "Time in phases"),
        h("span", { class: "big" }, duration(total)),
        h("span", { class: "from" }, `${run.step} steps`),
      ),
    peak > 0 &&
      h(
        "div",
        { class: "tile" },
        h("span", { class: "label" }, "Peak memory"),
        h("span", { class: "big" }, shown(peak), h("span", { class: "unit" }, "GB")),
        h("span", { class: "from" }, run.memory.some((m) => m.reserved) ? "on the GPU" : "process, no GPU"),
      ),
  );
}

/** Final figures: before and after of one run; the ends of several and their differences from the first. */
function figuresTable() {
  if (!severalRuns) {
    const run = runs[0];
    return table(
      ["figure", "before", "after", "change"],
      run.figures.map((f) => [
        f.name,
        shown(f.before),
        shown(f.after),
        f.before === null ? "\u2013" : signed(f.after - f.before),
      ]),
      { label: "Figures before and after" },
    );
  }
  const names = new Map(runs.flatMap((run) => run.figures.map((f) => [f.key, f.name])));
  const after = (run, key) => run.figures.find((f) => f.key === key)?.after ?? null;
  const rows = [...names].map(([key, name]) => [
    name,
    ...runs.flatMap((run, r) => {
      const value = after(run, key),
        first = after(runs[0], key);
      return r === 0
        ? [shown(value)]
        : [shown(value), value === null || first === null ? "\u2013" : signed(value - first)];
    }),
  ]);
  const total = (run) => Object.values(run.seconds).reduce((sum, s) => sum + s, 0);
  rows.push([
    "seconds in phases, whole run",
    ...runs.flatMap((run, r) => (r ? [shown(total(run)), signed(total(run) - total(runs[0]))] : [shown(total(run))])),
  ]);
  const head = [
    "figure, at the end",
    ...runs.flatMap((run, r) => (r ? [quoted(run.name), "difference"] : [quoted(run.name)])),
  ];
  return table(head, rows, { label: "Final figures of the runs", class: "compare" });
}

function configurationDifferences() {
  const keys = [...new Set(runs.flatMap((run) => Object.keys(run.config)))].sort();
  const value = (run, key) => run.config[key] ?? "not set";
  const rows = keys
    .filter((key) => new Set(runs.map((run) => value(run, key))).size > 1)
    .map((key) => [key, ...runs.map((run) => quoted(value(run, key)))]);
  return rows.length
    ? table(["setting", ...runs.map((run) => quoted(run.name))], rows, {
        label: "Settings that differ",
        class: "settings",
      })
    : h("p", { class: "note" }, "The configurations are equal.");
}

function configurationOf(run) {
  const { shipped } = run;
  const all = h(
    "details",
    {},
    h("summary", {}, `All ${Object.keys(run.config).length} settings`),
    table(
      ["setting", "value"],
      Object.entries(run.config).map(([key, value]) => [key, quoted(value)]),
      { label: "All settings", class: "settings" },
    ),
  );
  const differences = !shipped
    ? h("p", { class: "note" }, "No shipped configuration bears the name of this run.")
    : shipped.rows.length
      ? table(
          ["setting", `shipped, ${shipped.name}`, "this run"],
          shipped.rows.map(([key, a, b]) => [key, quoted(a), quoted(b)]),
          { label: "Differences from the shipped configuration", class: "settings" },
        )
      : h("p", { class: "note" }, `As ${shipped.name} is shipped.`);
  return h(
    "div",
    { class: "card" },
    severalRuns && h("h3", {}, quoted(run.name)),
    h("h4", {}, "Different from the shipped configuration"),
    differences,
    all,
  );
}

function surroundingsOf(run) {
  const { optimizations, environment, log } = run;
  const lines = (items) => h("pre", { class: "scroll", tabindex: "0" }, visible(items.join("\n")));
  return h(
    "div",
    { class: "card" },
    severalRuns && h("h3", {}, quoted(run.name)),
    h("h4", {}, "Optimizations"),
    optimizations.settings.length
      ? table(
          ["setting", "value"],
          optimizations.settings.map(([k, v]) => [k, quoted(v)]),
          { label: "Optimizations asked for", class: "settings" },
        )
      : h("p", { class: "note" }, "None beyond the defaults."),
    optimizations.tables.map((text) => lines([text])),
    h("h4", {}, "Environment"),
    environment.length
      ? h(
          "dl",
          { class: "facts" },
          environment.map(([k, v]) => [h("dt", {}, k), h("dd", {}, quoted(v))]),
        )
      : h("p", { class: "note" }, "The folder does not say; a finished run's model card does."),
    log.warnings.length > 0 && [h("h4", {}, "Warnings and errors of the log"), lines(log.warnings)],
    log.tail.length > 0 && h("details", {}, h("summary", {}, "End of the log"), lines(log.tail)),
  );
}

function smoothingField() {
  return select(
    "Smooth over",
    [
      ["0", "nothing"],
      ["5", "5 logged steps"],
      ["20", "20 logged steps"],
      ["100", "100 logged steps"],
    ],
    "0",
    (value) => {
      smoothing = Number(value);
      charts.forEach((chart) => {
        if (chart.drawn) chart.draw();
      });
    },
  );
}

function themeButton() {
  const order = ["auto", "light", "dark"];
  const button = h("button", {
    type: "button",
    class: "plain",
    title: "Colours of the page",
    onclick: () => {
      chosenTheme = order[(order.indexOf(chosenTheme) + 1) % 3];
      name();
      applyTheme();
    },
  });
  const name = () => fill(button, `Theme: ${chosenTheme}`);
  name();
  return button;
}

function build() {
  const names = runs.map((run) => run.name).join(", ");
  document.title = `${names} \u00b7 RLT run report`;
  const parts = [];
  const part = (id, title, ...content) => {
    if (content.flat().filter(Boolean).length)
      parts.push({ id, title, element: h("section", { id, class: "part" }, h("h2", {}, title), content) });
  };
  const grid = (cards) => cards.length > 0 && h("div", { class: "grid" }, cards);
  const spent = [
    ...runs.filter((run) => Object.keys(run.seconds).length).map(timeCard),
    ...runs.filter((run) => run.memory.length).map(memoryCard),
  ];
  const figures = () =>
    part(
      "figures",
      severalRuns ? "Comparison" : "Figures",
      h(
        "div",
        { class: "beside" },
        h("div", { class: "card" }, figuresTable()),
        h(
          "div",
          { class: "column" },
          severalRuns
            ? h("div", { class: "card" }, h("h3", {}, "Settings that differ"), configurationDifferences())
            : spent,
        ),
      ),
    );
  if (severalRuns) figures();
  const curves = chartCards("Learning");
  part(
    "learning",
    "Learning",
    curves.length > 0 &&
      h(
        "div",
        { class: "controls loose" },
        smoothingField(),
        h("p", { class: "note" }, "Drag to zoom, double click to see all steps."),
      ),
    grid(curves),
  );
  part("texts", "What it writes", grid(chartCards("What it writes")));
  if (runs.some((run) => run.method === "rlt" || run.samples.completions.num_shown))
    part("completions", "Completions", new SampleBrowser().element);
  part("update", "The update", grid(chartCards("The update")));
  part("cost", "Time and memory", grid([...(severalRuns ? spent : []), ...chartCards("Time and memory")]));
  if (!severalRuns) figures();
  const others = chartCards("Other figures");
  part(
    "other",
    "Other figures",
    others.length > 0 && h("details", {}, h("summary", {}, `${others.length} more logged figures`), grid(others)),
  );
  part("configuration", "Configuration", runs.map(configurationOf));
  part("environment", "Optimizations and environment", runs.map(surroundingsOf));
  const strides = runs
    .filter((run) => run.stride > 1)
    .map((run) => `${run.name}: every ${run.stride}th logged value is drawn.`);
  fill(
    document.getElementById("app"),
    h(
      "header",
      {},
      h(
        "div",
        { class: "titles" },
        h("p", { class: "kind" }, severalRuns ? `RLT run report \u00b7 ${runs.length} runs` : "RLT run report"),
        h("h1", {}, quoted(names)),
      ),
      themeButton(),
    ),
    h(
      "nav",
      { "aria-label": "Parts of the report" },
      parts.map(({ id, title }) => h("a", { href: `#${id}` }, title)),
    ),
    h(
      "main",
      { id: "main" },
      h("div", { class: severalRuns ? "verdicts" : "" }, runs.map(verdictCard)),
      !severalRuns && tiles(runs[0]),
      strides.map((text) => h("p", { class: "note" }, text)),
      parts.map(({ element }) => element),
    ),
    h(
      "footer",
      {},
      `Made ${data.made} from `,
      runs.map((run, i) => [i > 0 && ", ", h("code", {}, visible(run.folder))]),
      ". Charts by uPlot (MIT).",
    ),
  );
}

build();
