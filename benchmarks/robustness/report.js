"use strict";
// Sliders: the left image is shown up to the value of the range input that lies over both.
for (const stage of document.querySelectorAll(".stage")) {
  const input = stage.querySelector("input");
  const [left, right] = stage.querySelectorAll("b");
  const move = () => {
    stage.style.setProperty("--split", input.value + "%");
    input.setAttribute("aria-valuetext", `${input.value} % ${left.textContent}, the rest ${right.textContent}`);
  };
  input.addEventListener("input", move);
  move();
}
// Buttons that lay the clean or the noisy image over the others, until pressed again.
for (const button of document.querySelectorAll(".peek button")) {
  button.addEventListener("click", () => {
    const card = button.closest(".card");
    const shown = button.getAttribute("aria-pressed") !== "true";
    for (const other of card.querySelectorAll(".peek button"))
      other.setAttribute("aria-pressed", String(shown && other === button));
    for (const image of card.querySelectorAll(".over"))
      image.classList.toggle("shown", shown && image.classList.contains(button.dataset.over));
  });
}
// Switches: within its scope (a section), a panel shows if it agrees with every choice made there.
for (const scope of document.querySelectorAll(".scope")) {
  const chosen = {};
  const apply = () => {
    for (const panel of scope.querySelectorAll(".panel"))
      panel.hidden = Object.entries(chosen).some(([name, value]) => (panel.dataset[name] ?? value) !== value);
    for (const button of scope.querySelectorAll(".switch button"))
      button.setAttribute("aria-pressed", String(chosen[button.dataset.name] === button.dataset.value));
  };
  for (const button of scope.querySelectorAll(".switch button")) {
    if (button.getAttribute("aria-pressed") === "true") chosen[button.dataset.name] = button.dataset.value;
    button.addEventListener("click", () => {
      chosen[button.dataset.name] = button.dataset.value;
      apply();
    });
  }
  apply();
}
