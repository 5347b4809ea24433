// From file:// the search cannot read the pages it found, so it shows their titles only.
if (typeof DOCUMENTATION_OPTIONS !== "undefined" && location.protocol === "file:") DOCUMENTATION_OPTIONS.SHOW_SEARCH_SUMMARY = false;

document.addEventListener("DOMContentLoaded", () => {
  // The groups of the sidebar fold; the one that holds this page is open, or else the first.
  const here = document.querySelector(".bd-links p.caption + ul .current");
  document.querySelectorAll(".bd-links p.caption").forEach((caption, index) => {
    const list = caption.nextElementSibling;
    if (!list || list.tagName !== "UL") return;
    const group = document.createElement("details"), summary = document.createElement("summary");
    summary.className = caption.className;
    summary.append(...caption.childNodes);
    group.open = here ? list.contains(here) : index === 0;
    caption.replaceWith(group);
    group.append(summary, list);
  });
});
