"use strict";
// Turns a list of panels into a switch. Without this script every panel is simply shown.
const switches = [];
const choose = (entry, label) => {
  if (!entry.panels.some((panel) => panel.dataset.label === label)) return;
  entry.panels.forEach((panel, index) => {
    const on = panel.dataset.label === label;
    panel.hidden = !on;
    entry.buttons[index].setAttribute("aria-pressed", String(on));
  });
};
const build = (box, selector, name, group) => {
  const panels = [...box.querySelectorAll(selector)];
  if (panels.length < 2) return;
  const bar = document.createElement("div");
  bar.className = "switch";
  bar.setAttribute("role", "group");
  bar.setAttribute("aria-label", name);
  const entry = { panels, buttons: [], group };
  for (const panel of panels) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = panel.dataset.label;
    // A signal once chosen stays chosen for the other pairs: they are looked at to compare.
    button.addEventListener("click", () =>
      switches.filter((other) => other.group === group).forEach((other) => choose(other, panel.dataset.label)));
    entry.buttons.push(button);
    bar.append(button);
  }
  box.prepend(bar);
  box.classList.add("switched");
  switches.push(entry);
  choose(entry, panels[0].dataset.label);
};
document.querySelectorAll(".pairs").forEach((box) => build(box, ":scope > .pair", "Pair", "pair"));
document.querySelectorAll(".signals").forEach((box) => build(box, ":scope > .signal", "Signal", "signal"));
