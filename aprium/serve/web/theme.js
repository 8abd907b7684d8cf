// Sets the colour scheme before the first paint, so that nothing flashes; app.js switches it.
{
  const chosen = localStorage.getItem("aprium.theme");
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
}
