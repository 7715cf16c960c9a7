// The picture wall: filter, order, divide. Without it the page shows every prompt, side by side.
"use strict";
(() => {
  const wall = document.getElementById("wall");
  const form = document.getElementById("wall-controls");
  const more = document.getElementById("wall-all");
  const { filter, order, view, count } = form.elements;
  const cards = [...wall.children];
  const few = Number(wall.dataset.few);
  const error = (card) => Number(card.dataset.error);
  const ways = { given: () => 0, worst: (a, b) => error(b) - error(a), best: (a, b) => error(a) - error(b) };
  let all = false;

  function show() {
    const wanted = filter.value.trim().toLowerCase();
    const found = cards.filter((card) => card.querySelector("figcaption").textContent.toLowerCase().includes(wanted));
    const shown = new Set(all ? found : found.sort(ways[order.value]).slice(0, few));
    [...cards].sort(ways[order.value]).forEach((card) => {
      card.hidden = !shown.has(card);
      wall.append(card);
    });
    wall.classList.toggle("slide", view.value !== "");
    for (const card of cards) {
      card.querySelector(".divide").hidden = view.value === "";
      for (const cell of card.querySelectorAll(".cell")) cell.classList.toggle("chosen", cell.dataset.column === view.value);
    }
    more.hidden = shown.size === found.length;
    more.textContent = `Show all ${found.length}`;
    count.value = `${shown.size} of ${cards.length} prompts`;
  }

  for (const card of cards) {
    const divide = card.querySelector(".divide");
    const picture = card.querySelector(".cell.teacher");
    const set = () => card.style.setProperty("--at", `${divide.value}%`);
    const drag = (event) => {
      if (view.value === "" || (event.pointerType !== "mouse" && !event.isPrimary)) return;
      const box = picture.getBoundingClientRect();
      divide.value = (100 * (event.clientX - box.left)) / box.width;
      set();
    };
    divide.addEventListener("input", set);
    picture.addEventListener("pointerdown", (event) => {
      picture.setPointerCapture(event.pointerId);
      drag(event);
    });
    picture.addEventListener("pointermove", (event) => event.buttons && drag(event));
  }

  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("input", show);
  more.addEventListener("click", () => {
    all = true;
    show();
  });
  form.hidden = cards.length < 2;
  show();
})();
