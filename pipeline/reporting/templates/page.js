// Makes tables sortable and adds tooltips to the marks of figures. The page also works without this script.
"use strict";

// The rows of a table body stay together: a run, or the mean of several seeds and the seeds below it.
for (const table of document.querySelectorAll("table.sortable")) {
  const headings = [...table.querySelectorAll("thead tr:last-child th")];
  headings.forEach((heading, column) => {
    if (heading.classList.contains("links")) return;
    const button = document.createElement("button");
    button.type = "button";
    button.append(...heading.childNodes);
    heading.append(button);
    button.addEventListener("click", () => {
      // Numbers sort from the largest, text from A to Z.
      const before = heading.getAttribute("aria-sort");
      const upwards = before ? before === "descending" : heading.classList.contains("word");
      headings.forEach((other) => other.removeAttribute("aria-sort"));
      heading.setAttribute("aria-sort", upwards ? "ascending" : "descending");
      const known = (body) => body.rows[0].cells[column].dataset.order ?? "";
      const compare = (a, b) => {
        const [x, y] = [known(a), known(b)];
        if (x === "" || y === "") return (x === "") - (y === "");
        const order = isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y;
        return upwards ? order : -order;
      };
      table.append(...[...table.tBodies].sort(compare));
    });
  });
}

const tip = document.createElement("div");
tip.className = "tip";
tip.setAttribute("role", "status");
tip.hidden = true;
document.body.append(tip);

function light(run) {
  for (const svg of document.querySelectorAll("figure svg")) {
    const marks = [...svg.querySelectorAll(".mark")];
    const lit = marks.filter((mark) => mark.dataset.run === run);
    marks.forEach((mark) => mark.classList.toggle("lit", lit.includes(mark)));
    svg.classList.toggle("dim", lit.length > 0);
  }
  for (const row of document.querySelectorAll("tr[data-run]")) row.classList.toggle("lit", row.dataset.run === run);
}

function show(mark) {
  tip.textContent = mark.getAttribute("aria-label");
  tip.hidden = false;
  const at = mark.getBoundingClientRect();
  const left = Math.min(at.left + at.width / 2 - tip.offsetWidth / 2, document.body.clientWidth - tip.offsetWidth - 4);
  tip.style.left = `${Math.max(4, left) + scrollX}px`;
  tip.style.top = `${Math.max(0, at.top + scrollY - tip.offsetHeight - 8)}px`;
  light(mark.dataset.run);
}

function hide() {
  tip.hidden = true;
  light(null);
}

for (const svg of document.querySelectorAll("figure svg")) {
  const marks = [...svg.querySelectorAll(".mark")];
  marks.forEach((mark, number) => {
    const title = mark.querySelector("title");
    mark.setAttribute("role", "img");
    mark.setAttribute("aria-label", title.textContent);
    title.remove(); // avoids the browser's own tooltip
    mark.setAttribute("tabindex", number ? -1 : 0); // Tab enters a figure, arrow keys move through its marks
    mark.addEventListener("pointerenter", () => show(mark));
    mark.addEventListener("pointerleave", hide);
    mark.addEventListener("focus", () => show(mark));
    mark.addEventListener("blur", hide);
    mark.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      if (event.key === "Escape") hide();
      if (!step) return;
      event.preventDefault();
      marks[(number + step + marks.length) % marks.length].focus();
    });
  });
}

for (const row of document.querySelectorAll("tr[data-run]")) {
  row.addEventListener("pointerenter", () => light(row.dataset.run));
  row.addEventListener("pointerleave", () => light(null));
}
