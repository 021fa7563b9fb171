"""How the page looks and listens: Gradio's theme, CSS, and a few lines of JavaScript."""

from __future__ import annotations

from typing import Any

import gradio as gr

PHONE_PX = 640  # narrower windows are phones
PREVIEW_PX = 520  # height of an image that was clicked

# Text on its background has a contrast of 4.5 or more (WCAG 2.2, AA); tests/test_page_items.py measures it.
THEME = gr.themes.Soft(
    primary_hue="teal", secondary_hue="teal", neutral_hue="slate", font=("system-ui", "sans-serif")
).set(
    button_primary_background_fill="*primary_700",
    button_primary_background_fill_dark="*primary_700",
    button_primary_background_fill_hover="*primary_800",
    button_primary_background_fill_hover_dark="*primary_800",
    button_primary_text_color="white",
    block_title_text_color="*primary_900",
    block_title_text_color_dark="*primary_100",
    block_label_text_color="*primary_900",
    block_label_text_color_dark="*primary_100",
    block_title_background_fill_dark="*primary_800",
    block_label_background_fill_dark="*primary_800",
    checkbox_label_background_fill_selected="*primary_700",
    checkbox_label_background_fill_selected_dark="*primary_700",
    block_info_text_color="*neutral_600",
    block_info_text_color_dark="*neutral_300",
    body_text_color_subdued="*neutral_600",
    body_text_color_subdued_dark="*neutral_300",
    input_border_width="1px",
    input_border_color="*neutral_300",
    checkbox_border_color="*neutral_500",
    checkbox_label_border_width="1px",
    checkbox_label_border_color="*neutral_300",
    button_border_width="1px",
    button_secondary_border_color="*neutral_300",
    button_secondary_background_fill_hover_dark="*neutral_700",
    input_placeholder_color="*neutral_500",
    input_placeholder_color_dark="*neutral_400",
    link_text_color="*primary_700",
    link_text_color_dark="*primary_300",
)

CSS = f"""
.gradio-container {{max-width: min(1180px, 100vw) !important; margin: 0 auto !important}}
.gradio-container > .main, .gradio-container .wrap, main.contain {{max-width: 100%; min-width: 0}}
.results, .results .grid-wrap {{
  height: auto !important; min-height: 0 !important; max-height: none !important;
}}
.results .preview {{position: relative !important; height: {PREVIEW_PX}px !important}}
.results:has(.preview) .grid-wrap {{display: none}}
.results .caption-label {{
  font-size: var(--text-xs); line-height: 1.2; white-space: normal; max-width: 96%; inset-inline-start: auto;
}}
.results img {{object-fit: contain !important; width: 100% !important; height: 100% !important}}
button[role=tab].selected {{color: var(--primary-700) !important}}
.dark button[role=tab].selected {{color: var(--primary-300) !important}}
.token .text, .legend-item {{color: #0f172a !important}}
.dark .token .text {{color: white !important}}
.dark .legend-item {{color: white !important}}
body.pixelated img, body.pixelated .token-grid > div {{image-rendering: pixelated}}
#settings-png .icon-wrap {{display: none}}
.figure {{background: white; border-radius: 8px; width: 100%; max-width: 1000px}}
.prose td, .prose th {{overflow-wrap: normal !important; word-break: normal !important}}
.shortcuts {{font-size: var(--text-sm); color: var(--body-text-color-subdued)}}
.shortcuts kbd {{
  border: 1px solid var(--border-color-primary); border-radius: 4px; padding: 0 4px; font-family: inherit;
}}
.status p {{margin: 0; min-height: 1.5em}}
.status .error {{
  border-left: 4px solid #b91c1c; padding-left: 8px; color: #991b1b; font-weight: 600;
}}
.dark .status .error {{border-color: #f87171; color: #fca5a5}}
@media (max-width: {PHONE_PX}px) {{
  .gradio-container {{padding: 8px !important}}
  .results .preview {{height: 400px !important}}
  button[role=tab] {{padding: 0 8px !important; font-size: var(--text-sm) !important}}
  h1 {{font-size: 1.4em !important}}
  .prose td, .prose th {{padding: 4px !important; font-size: var(--text-xs)}}
  main, .gradio-container > .main {{padding: 0 !important}}
  .many .grid-container {{grid-template-columns: repeat(3, minmax(0, 1fr)) !important}}
  .ranking td, .ranking th {{font-size: var(--text-xs) !important; padding: 2px !important}}
}}
"""

# Enter in a prompt and Ctrl+Enter anywhere press the main button of the open tab. A PNG that is dropped on
# the tab "Text to image" goes to its upload field, wherever it falls. On a phone a tap on a main button
# scrolls to the results.
SCRIPT = f"""
<script>
const visible = (selector) => [...document.querySelectorAll(selector)].find((found) => found.offsetParent);

document.addEventListener("keydown", (event) => {{
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  if (!(event.ctrlKey || event.metaKey || event.target.closest(".enter-runs"))) return;
  const run = visible(".run");
  if (!run) return;
  event.preventDefault();
  run.click();
}}, true);

const dropZone = () => {{
  const zone = visible("#settings-png");
  return zone ? zone.querySelector("input[type=file]") : null;
}};
document.addEventListener("dragover", (event) => {{ if (dropZone()) event.preventDefault(); }});
document.addEventListener("drop", (event) => {{
  const field = dropZone();
  if (!field || event.target.closest("#settings-png") || !event.dataTransfer.files.length) return;
  event.preventDefault();
  field.files = event.dataTransfer.files;
  field.dispatchEvent(new Event("change", {{bubbles: true}}));
}});

// What Gradio leaves without a name gets one: images to click, empty galleries, and text fields with a copy
// button, which takes the label.
const nameAll = () => {{
  document.querySelectorAll("button.gallery-item:not([aria-label])").forEach((button) => {{
    const number = [...button.parentElement.children].indexOf(button) + 1;
    button.setAttribute("aria-label", `Take example ${{number}}`);
  }});
  document.querySelectorAll(".empty[aria-label]:not([role])").forEach((box) => {{
    box.setAttribute("role", "img");
  }});
  document.querySelectorAll("label:has(.icon-button) textarea:not([aria-label])").forEach((field) => {{
    const title = field.closest("label").querySelector("[data-testid=block-info]");
    if (title) field.setAttribute("aria-label", title.innerText);
  }});
}};
new MutationObserver(nameAll).observe(document.documentElement, {{childList: true, subtree: true}});

// The page may be too short to scroll so far before the first result is there.
let followed = null;
new ResizeObserver(() => {{
  if (!followed) return;
  followed.scrollIntoView({{block: "start"}});
  if (followed.getBoundingClientRect().top < 10) followed = null;
}}).observe(document.documentElement);
["touchmove", "wheel"].forEach((name) => document.addEventListener(name, () => {{ followed = null; }}));

document.addEventListener("click", (event) => {{
  if (!event.target.closest(".run") || window.innerWidth > {PHONE_PX}) return;
  const status = visible(".status");
  if (!status) return;
  status.scrollIntoView({{behavior: "smooth", block: "start"}});
  followed = status;
}});
</script>
"""

LOOK: dict[str, Any] = {"theme": THEME, "css": CSS, "head": SCRIPT}
"""Options of `gr.Blocks.launch`."""
