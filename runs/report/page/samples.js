// The browser of completions: a list whose rows are drawn as they come into view, and one completion, group or pair beside it.

/** Solution: log-prob, the lower the stronger. Explanation: KL, positive orange, negative blue and underlined. */
const SCALES = {
  logprob: {
    top: 5,
    level: (value) => -value,
    unit: "log-prob",
    tip: (v) => `log-prob ${shown(v)} nats \u00b7 probability ${shown(Math.exp(v))}`,
  },
  kl: {
    top: 3,
    level: (value) => value,
    unit: "KL",
    tip: (v) => `log p(teacher) ${MINUS} log p(student) = ${signed(v)} nats`,
  },
};

/** A text with its tokens coloured; what has no score stands as it is. */
function colouredText(text, scores, kind, offset = 0) {
  const box = h("div", { class: "text", dir: "auto" });
  if (!scores || !scores.l.length) {
    add(box, [visible(text)]);
    return box;
  }
  const scale = SCALES[kind];
  box.tabIndex = 0;
  box.setAttribute("role", "group");
  box.setAttribute(
    "aria-label",
    `${kind === "kl" ? "Explanation with KL" : "Solution with log-prob"} of each token; arrow keys read them`,
  );
  if (offset) box.append(visible(text.slice(0, offset)));
  let at = offset;
  scores.l.forEach((length, i) => {
    const piece = text.slice(at, at + length);
    at += length;
    const value = scores.v[i];
    if (value === null) {
      box.append(visible(piece));
      return;
    }
    const level = scale.level(value / 100);
    const strength = Math.min(8, Math.round(8 * Math.sqrt(Math.abs(level) / scale.top)));
    const token = h(
      "span",
      { class: `tok ${level >= 0 ? "p" : "n"}${strength}` },
      piece === "" ? "\u25cc" : visible(piece),
    );
    token.score = { kind, value: value / 100, piece };
    box.append(token);
  });
  if (at < text.length) box.append(visible(text.slice(at)));
  box.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (event.key === "Escape") hideTip();
    if (!move) return;
    event.preventDefault();
    const tokens = [...box.querySelectorAll(".tok")];
    const place = Math.max(0, Math.min(tokens.length - 1, (box.place ?? (move > 0 ? -1 : tokens.length)) + move));
    box.place = place;
    tokens[place].scrollIntoView({ block: "nearest" });
    showTip(tokens[place]);
    say(tipText(tokens[place]));
  });
  box.addEventListener("blur", hideTip);
  return box;
}

const tip = document.getElementById("tip");
const tipText = (token) =>
  `${JSON.stringify(visible(token.score.piece))}: ${SCALES[token.score.kind].tip(token.score.value)}`;

function showTip(token) {
  hideTip();
  token.classList.add("at");
  tip.textContent = tipText(token);
  tip.hidden = false;
  const place = token.getBoundingClientRect(),
    own = tip.getBoundingClientRect();
  tip.style.left = `${Math.max(6, Math.min(innerWidth - own.width - 6, place.left))}px`;
  tip.style.top = `${place.top > own.height + 10 ? place.top - own.height - 6 : place.bottom + 6}px`;
}

function hideTip() {
  document.querySelectorAll(".tok.at").forEach((token) => token.classList.remove("at"));
  tip.hidden = true;
}

for (const type of ["pointerover", "click"]) {
  document.addEventListener(type, (event) => {
    if (event.target.score) showTip(event.target);
    else hideTip();
  });
}
addEventListener("scroll", hideTip, { passive: true, capture: true });

/** A list of any length in a box of fixed height: only rows in view are in the page. */
class VirtualList {
  constructor(label, rowHeight, drawRow, choose) {
    Object.assign(this, { rowHeight, drawRow, choose, items: [], chosen: -1 });
    this.space = h("div", { class: "space" });
    this.element = h(
      "div",
      {
        class: "list",
        tabindex: "0",
        role: "listbox",
        "aria-label": label,
        onscroll: () => this.draw(),
        onkeydown: (event) => this.key(event),
      },
      this.space,
    );
    new ResizeObserver(() => this.draw()).observe(this.element);
  }

  show(items) {
    this.items = items;
    this.space.style.height = `${items.length * this.rowHeight}px`;
    this.element.scrollTop = 0;
    this.pick(items.length ? 0 : -1);
  }

  draw() {
    const first = Math.max(0, Math.floor(this.element.scrollTop / this.rowHeight) - 4);
    const last = Math.min(
      this.items.length,
      Math.ceil((this.element.scrollTop + this.element.clientHeight) / this.rowHeight) + 4,
    );
    fill(
      this.space,
      this.items.slice(first, last).map((item, i) => {
        const place = first + i;
        const row = h(
          "div",
          {
            class: "row",
            role: "option",
            id: `row-${place}`,
            "aria-selected": String(place === this.chosen),
            "aria-posinset": place + 1,
            "aria-setsize": this.items.length,
            onclick: () => this.pick(place),
          },
          this.drawRow(item),
        );
        row.style.top = `${place * this.rowHeight}px`;
        row.style.height = `${this.rowHeight}px`;
        return row;
      }),
    );
    if (this.chosen >= 0) this.element.setAttribute("aria-activedescendant", `row-${this.chosen}`);
  }

  pick(place) {
    this.chosen = place;
    const top = place * this.rowHeight,
      height = this.element.clientHeight;
    if (top < this.element.scrollTop) this.element.scrollTop = top;
    else if (height && top + this.rowHeight > this.element.scrollTop + height)
      this.element.scrollTop = top + this.rowHeight - height;
    this.draw();
    this.choose(this.items[place]);
  }

  key(event) {
    const page = Math.max(1, Math.floor(this.element.clientHeight / this.rowHeight) - 1);
    const move = { ArrowUp: -1, ArrowDown: 1, PageUp: -page, PageDown: page, Home: -Infinity, End: Infinity }[
      event.key
    ];
    if (!move || !this.items.length) return;
    event.preventDefault();
    this.pick(Math.max(0, Math.min(this.items.length - 1, this.chosen + move)));
  }
}

const mean = (values) => values.reduce((sum, value) => sum + value, 0) / (values.length || 1);
const rewards = (group) => group.rows.map((row) => row.r).filter((r) => r !== null);
const chip = (label, value, className = "") =>
  h("span", { class: `chip ${className}` }, label && h("span", {}, label), value);
const advantageChip = (row) =>
  row.a !== undefined && chip("advantage", signed(row.a), row.a > 0 ? "up" : row.a < 0 ? "down" : "");

/** One completion: explanation, solution, and the terms of its reward. */
function completionView(row, group, terms, { heading = null, withScales = true } = {}) {
  const tokens = row.st;
  const own = tokens && tokens.t !== undefined;
  return h(
    "article",
    { class: "completion" },
    h(
      "div",
      { class: "chips" },
      heading && h("h4", {}, heading),
      chip("reward", shown(row.r)),
      advantageChip(row),
      row.k && chip("", quoted(row.k), "kind"),
    ),
    h(
      "h5",
      {},
      "Explanation",
      row.et && row.et.l.length ? withScales && legend("kl") : h("span", { class: "note" }, "no token scores kept"),
    ),
    colouredText(row.e, row.et, "kl"),
    row.cut && h("p", { class: "note" }, `${row.cut.toLocaleString("en-US")} more characters are in the table.`),
    h("h5", {}, "Solution, as the student finds it", tokens && withScales && legend("logprob")),
    colouredText(own ? tokens.t : group.s, tokens, "logprob", own ? 0 : tokens ? tokens.o : 0),
    h(
      "details",
      { class: "terms" },
      h("summary", {}, "Terms of the reward"),
      h(
        "dl",
        {},
        terms.map((name, i) => [h("dt", {}, name), h("dd", {}, shown(row.v[i]))]),
      ),
    ),
  );
}

function legend(kind) {
  const cells = kind === "kl" ? ["n8", "n4", "p0", "p4", "p8"] : ["p0", "p2", "p4", "p6", "p8"];
  const ends = kind === "kl" ? [`${MINUS}3`, "+3 nats KL"] : ["0", `${MINUS}5 nats log-prob`];
  return h(
    "span",
    { class: "scale" },
    ends[0],
    cells.map((name) => h("span", { class: `tok ${name}` })),
    ends[1],
  );
}

class SampleBrowser {
  constructor() {
    this.run = runs.find((run) => run.samples.completions.num_shown || run.samples.held_out.pairs.length) || runs[0];
    const views = [
      ["all", "Completions"],
      ["groups", "Groups"],
      ["pairs", "Before and after"],
    ];
    this.state = {
      view: this.run.samples.completions.num_shown ? "all" : "pairs",
      sort: "latest",
      step: "",
      kind: "",
      text: "",
    };
    this.controls = h("div", { class: "controls" });
    this.count = h("p", { class: "note", role: "status" });
    this.detail = h("div", { class: "detail", tabindex: "0", role: "region", "aria-label": "Chosen completion" });
    this.list = new VirtualList(
      "Completions",
      62,
      (item) => this.rowOf(item),
      (item) => this.show(item),
    );
    this.tabs = h(
      "div",
      { class: "tabs", role: "group", "aria-label": "View" },
      views.map(([key, name]) =>
        h(
          "button",
          {
            type: "button",
            "data-view": key,
            onclick: () => {
              this.state.view = key;
              this.state.sort = key === "pairs" ? "change" : "latest";
              this.build();
            },
          },
          name,
        ),
      ),
    );
    this.element = h(
      "div",
      { class: "browser card" },
      this.tabs,
      this.controls,
      this.count,
      h("div", { class: "panes" }, this.list.element, this.detail),
    );
    this.build();
  }

  build() {
    const { state } = this;
    this.tabs
      .querySelectorAll("button")
      .forEach((b) => b.setAttribute("aria-pressed", String(b.dataset.view === state.view)));
    this.everything = this.items();
    const kinds = [
      ...new Set(this.everything.flatMap((item) => this.rowsIn(item).map((row) => row.k)).filter(Boolean)),
    ].sort();
    const steps = this.run.samples.completions.steps.map((s) => [String(s.step), String(s.step)]);
    const sorts = {
      all: [
        ["latest", "latest step"],
        ["best", "highest reward"],
        ["worst", "lowest reward"],
        ["up", "highest advantage"],
        ["down", "lowest advantage"],
        ["long", "longest"],
      ],
      groups: [
        ["latest", "latest step"],
        ["best", "highest mean reward"],
        ["worst", "lowest mean reward"],
        ["spread", "widest spread"],
      ],
      pairs: [
        ["change", "largest gain"],
        ["loss", "largest loss"],
        ["best", "highest reward after"],
        ["worst", "lowest reward after"],
      ],
    }[state.view];
    const set = (name) => (value) => {
      state[name] = value;
      this.refresh();
    };
    fill(
      this.controls,
      severalRuns &&
        select(
          "Run",
          runs.map((run, i) => [String(i), run.name]),
          String(runs.indexOf(this.run)),
          (i) => {
            this.run = runs[Number(i)];
            Object.assign(state, { step: "", kind: "" });
            this.build();
          },
        ),
      select("Sort by", sorts, state.sort, set("sort")),
      state.view !== "pairs" && select("Step", [["", "all"], ...steps], state.step, set("step")),
      kinds.length > 0 && select("Kind", [["", "all"], ...kinds.map((k) => [k, visible(k)])], state.kind, set("kind")),
      h(
        "label",
        { class: "field grow" },
        h("span", {}, "Text"),
        h("input", {
          type: "search",
          value: state.text,
          placeholder: "question, solution or explanation",
          oninput: (event) => set("text")(event.target.value),
        }),
      ),
    );
    this.refresh();
  }

  items() {
    const { completions, held_out: heldOut } = this.run.samples;
    if (this.state.view === "pairs") return heldOut.pairs.map((pair) => ({ pair }));
    const groups = completions.steps.flatMap(({ step, groups }) => groups.map((group) => ({ step, group })));
    return this.state.view === "groups"
      ? groups
      : groups.flatMap(({ step, group }) => group.rows.map((row) => ({ step, group, row })));
  }

  rowsIn(item) {
    return item.row ? [item.row] : (item.group || item.pair).rows;
  }

  refresh() {
    const { view, sort, step, kind, text } = this.state;
    const wanted = text.toLowerCase();
    const found = this.everything.filter((item) => {
      const group = item.group || item.pair,
        rows = this.rowsIn(item);
      return (
        (!step || view === "pairs" || item.step === Number(step)) &&
        (!kind || rows.some((row) => row.k === kind)) &&
        (!wanted || [group.q, group.s, ...rows.map((row) => row.e)].some((t) => t.toLowerCase().includes(wanted)))
      );
    });
    const least = (value) => (value === null || value === undefined ? -Infinity : value);
    const reward = (item) =>
      item.row ? least(item.row.r) : item.pair ? least(item.pair.rows.at(-1).r) : mean(rewards(item.group));
    const spread = (item) => Math.max(...rewards(item.group)) - Math.min(...rewards(item.group));
    const keys = {
      latest: (item) => item.step,
      best: reward,
      worst: (item) => -reward(item),
      spread,
      up: (item) => least(item.row.a),
      down: (item) => -(item.row.a ?? Infinity),
      long: (item) => item.row.e.length,
      change: (item) => least(this.change(item.pair)),
      loss: (item) => -(this.change(item.pair) ?? Infinity),
    };
    found.sort((a, b) => keys[sort](b) - keys[sort](a));
    fill(this.count, this.countText(found.length));
    this.list.show(found);
  }

  countText(number) {
    const { completions, held_out: heldOut } = this.run.samples;
    const n = (value) => value.toLocaleString("en-US");
    if (this.state.view === "pairs") {
      const when =
        heldOut.steps.length > 1
          ? `at steps ${heldOut.steps.join(" and ")}`
          : heldOut.steps.length
            ? `at step ${heldOut.steps[0]}, the only evaluation so far`
            : "";
      return heldOut.steps.length
        ? `${n(number)} of ${n(heldOut.num_questions)} held-out questions, ${when}.`
        : "There is no table of held-out explanations.";
    }
    if (!completions.num_shown) return "There is no table of completions.";
    const parts = [`${n(number)} ${this.state.view === "groups" ? "groups" : "completions"}.`];
    if (completions.steps.length < completions.num_steps || completions.num_shown < completions.num_rows)
      parts.push(
        `The page holds ${n(completions.num_shown)} of ${n(completions.num_rows)} completions of ${completions.steps.length} of ${n(completions.num_steps)} logged steps, evenly spread; the tables in completions/ hold all.`,
      );
    return parts.join(" ");
  }

  /** Gain of the student's log-prob of the solution, else of the reward. */
  change(pair) {
    if (pair.rows.length < 2) return null;
    const i = this.run.samples.held_out.terms.indexOf("unprocessed_answer_log_prob_mean");
    const [before, after] = pair.rows.map((row) => (i < 0 ? row.r : row.v[i]));
    return before === null || after === null ? null : after - before;
  }

  rowOf(item) {
    const line = (...parts) => h("div", { class: "line" }, parts);
    const text = (t, c) => quoted(t.slice(0, 160).replaceAll("\n", " "), c);
    if (item.row)
      return [
        line(
          chip("step", item.step),
          chip("", shown(item.row.r), "value"),
          advantageChip(item.row),
          item.row.k && chip("", quoted(item.row.k), "kind"),
        ),
        line(text(item.group.q, "q"), text(item.row.e, "e")),
      ];
    if (item.group)
      return [
        line(
          chip("step", item.step),
          chip("mean", shown(mean(rewards(item.group))), "value"),
          chip("", `${shown(Math.min(...rewards(item.group)))} to ${shown(Math.max(...rewards(item.group)))}`),
          chip("", `${item.group.rows.length} completions`),
        ),
        line(text(item.group.q, "q"), text(item.group.s, "e")),
      ];
    const change = this.change(item.pair);
    return [
      line(
        chip("log-prob", signed(change), change > 0 ? "up" : change < 0 ? "down" : ""),
        chip("reward", item.pair.rows.map((row) => shown(row.r)).join(" \u2192 ")),
      ),
      line(text(item.pair.q, "q"), text(item.pair.rows.at(-1).e, "e")),
    ];
  }

  show(item) {
    const { completions, held_out: heldOut } = this.run.samples;
    if (!item) {
      fill(this.detail, h("p", { class: "note" }, "Nothing here."));
      return;
    }
    const group = item.group || item.pair;
    const asked = [h("h3", {}, "Question"), h("div", { class: "text", dir: "auto" }, visible(group.q))];
    const solved = [h("h3", {}, "Solution"), h("div", { class: "text", dir: "auto" }, visible(group.s))];
    if (item.row)
      fill(
        this.detail,
        asked,
        completionView(item.row, group, completions.terms, { heading: `Step ${item.step}` }),
        h(
          "button",
          { type: "button", class: "plain", onclick: () => this.showGroup(item) },
          `All ${group.rows.length} completions of this prompt`,
        ),
      );
    else if (item.group)
      fill(
        this.detail,
        asked,
        solved,
        [...group.rows]
          .sort((a, b) => (b.r ?? -Infinity) - (a.r ?? -Infinity))
          .map((row, i) =>
            completionView(row, group, completions.terms, { heading: `#${i + 1}`, withScales: i === 0 }),
          ),
      );
    else
      fill(
        this.detail,
        asked,
        h(
          "div",
          { class: "pair" },
          group.rows.map((row, i) =>
            completionView(row, group, heldOut.terms, {
              heading:
                group.rows.length > 1
                  ? `${i ? "After" : "Before"} \u00b7 step ${heldOut.steps[i]}`
                  : `Step ${heldOut.steps[0]}`,
            }),
          ),
        ),
      );
    this.detail.scrollTop = 0;
  }

  showGroup({ group }) {
    Object.assign(this.state, { view: "groups", sort: "latest", step: "", kind: "", text: "" });
    this.build();
    this.list.pick(this.list.items.findIndex((item) => item.group === group));
  }
}
