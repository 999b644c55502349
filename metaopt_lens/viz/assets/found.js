(() => {
  "use strict";
  const signed = (x) => {
    const size = Math.abs(x).toFixed(2);
    return Number(size) === 0 ? size : (x < 0 ? "−" : "+") + size;
  };
  const shade = (x, bound) =>
    `rgba(${x >= 0 ? "29, 95, 191" : "194, 65, 12"}, ${(0.6 * Math.min(Math.abs(x) / (bound || 1), 1)).toFixed(3)})`;
  const element = (name, text, of) => {
    const made = document.createElement(name);
    if (text !== undefined) made.textContent = text;
    if (of) made.className = of;
    return made;
  };

  for (const root of document.querySelectorAll(".ml-found")) {
    if (root.dataset.ready) continue;
    root.dataset.ready = "1";
    const data = JSON.parse(root.dataset.found);
    const [first, stop] = data.demos;
    const pick = root.querySelector(".ml-pick");
    const kind = root.querySelector(".ml-value");
    const status = root.querySelector(".ml-status");
    const card = root.querySelector(".ml-headcard");
    const state = { head: "", scope: "all", value: "tokens", without: null };

    const inScope = (i) =>
      state.scope === "all" || (i >= first && i < stop) === (state.scope === "demo");

    const tokens = () => {
      const attention = state.head !== "" && state.value === "attention";
      const values = state.head === "" ? data.all : data.heads[state.head][attention ? "attention" : "tokens"];
      const bound = Math.max(...values.map((x, i) => (inScope(i) ? Math.abs(x) : 0)));
      const show = (x) => (attention ? x.toFixed(3) : signed(x));
      for (const row of root.querySelectorAll(".ml-tokens .ml-line")) {
        let total = 0;
        for (const span of row.querySelectorAll(".ml-token")) {
          const i = Number(span.dataset.token);
          total += values[i];
          span.style.background = inScope(i) ? shade(values[i], bound) : "transparent";
          span.title = show(values[i]);
        }
        row.querySelector(".ml-total").textContent = show(total);
        const button = row.querySelector("button.ml-name");
        if (button) row.classList.toggle("ml-off", Number(button.dataset.demo) === state.without);
      }
    };

    const open = () => {
      card.hidden = state.head === "";
      kind.hidden = state.head === "";
      for (const cell of root.querySelectorAll("[data-head]"))
        cell.classList.toggle("ml-chosen", cell.dataset.head === state.head);
      if (state.head === "") return;
      const about = data.heads[state.head];
      card.replaceChildren(element("h3", state.head));
      const mass = about.attention.slice(first, stop).reduce((a, b) => a + b, 0);
      const facts = [`attention on the demonstrations ${mass.toFixed(3)}`];
      if (about.exact !== undefined) facts.push(`knock-out ${signed(about.exact)} (exact)`);
      if (about.first !== undefined) facts.push(`knock-out ${signed(about.first)} (first-order estimate)`);
      card.append(element("p", facts.join(" · "), "ml-quiet"));
      for (const [part, key, value] of [
        ["zero-shot part", "zero_shot", about.zs],
        ["meta-gradient part", "meta_gradient", about.mg],
      ]) {
        const block = element("div", undefined, "ml-partcard");
        block.append(element("b", `${part} ${signed(value)}`));
        if (about.words)
          ["promotes", "suppresses"].forEach((what, side) => {
            const line = element("div");
            line.append(element("span", what, "ml-side"));
            for (const word of about.words[key][side]) line.append(element("code", word), " ");
            block.append(line);
          });
        card.append(block);
      }
    };

    const choose = (head) => {
      state.head = head;
      pick.value = head;
      if (head === "") state.value = "tokens";
      open();
      tokens();
    };
    const press = (group, chosen) => {
      for (const button of group.querySelectorAll("button"))
        button.setAttribute("aria-pressed", String(button === chosen));
    };

    pick.addEventListener("change", () => choose(pick.value));
    root.addEventListener("click", (event) => {
      const target = event.target;
      const scope = target.closest("[data-scope]");
      const value = target.closest("[data-value]");
      const demo = target.closest("[data-demo]");
      const head = target.closest("[data-head]");
      if (scope) {
        state.scope = scope.dataset.scope;
        press(scope.parentElement, scope);
        tokens();
      } else if (value) {
        state.value = value.dataset.value;
        press(value.parentElement, value);
        tokens();
      } else if (demo) {
        const number = Number(demo.dataset.demo);
        state.without = state.without === number ? null : number;
        for (const button of root.querySelectorAll("[data-demo]"))
          button.setAttribute("aria-pressed", String(Number(button.dataset.demo) !== state.without));
        const now = data.without[state.without];
        status.textContent =
          state.without === null
            ? ""
            : `Without demonstration ${state.without + 1} the logit is ${signed(now)}: ${signed(now - data.logit)} against all of them.`;
        tokens();
      } else if (head) choose(state.head === head.dataset.head ? "" : head.dataset.head);
    });
  }
})();
