// How to answer: sampling, thinking, the system prompt and tools, kept in this browser.

import { el } from "./dom.js";

const STORE = "aprium.settings";

const EXAMPLE = [
  {
    type: "function",
    function: {
      name: "get_weather",
      description: "Get the weather of a city.",
      parameters: {
        type: "object",
        properties: { city: { type: "string", description: "The city." } },
        required: ["city"],
      },
    },
  },
];

// Field of the form -> field of a request, for those that are numbers and may be empty.
const NUMBERS = {
  temperature: "temperature",
  top_p: "top_p",
  max_tokens: "max_tokens",
  seed: "seed",
  thinking_budget: "thinking_token_budget",
};

/** The dialog of settings; an empty field leaves the choice to the server. */
export class Settings {
  constructor(dialog) {
    this.dialog = dialog;
    this.form = dialog.querySelector("form");
    this.fields = this.form.elements;
    this.read(JSON.parse(localStorage.getItem(STORE) ?? "{}"));
    this.form.addEventListener("input", () => this.changed());
    this.form.addEventListener("submit", (event) => {
      event.preventDefault(); // the button is pressed only where all fields are well
      dialog.close();
    });
    this.fields.namedItem("example").addEventListener("click", () => {
      this.fields.tools.value = JSON.stringify(EXAMPLE, null, 2);
      this.changed();
    });
    this.fields.namedItem("reset").addEventListener("click", () => {
      this.form.reset();
      this.changed();
    });
    this.changed();
  }

  get values() {
    const found = {};
    for (const field of this.fields) {
      if (field.name) found[field.name] = field.type === "checkbox" ? field.checked : field.value;
    }
    return found;
  }

  /** The system prompt of new conversations. */
  get system() {
    return this.fields.system.value.trim();
  }

  read(values) {
    for (const [name, value] of Object.entries(values)) {
      const field = this.fields.namedItem(name);
      if (field?.type === "checkbox") field.checked = value;
      else if (field) field.value = value;
    }
  }

  changed() {
    this.fields.tools.setCustomValidity(toolsProblem(this.fields.tools.value));
    this.fields.thinking_budget.disabled = !this.fields.thinking.checked;
    const wrong = this.fields.tools.validationMessage;
    document.getElementById("tools-problem").textContent = wrong;
    localStorage.setItem(STORE, JSON.stringify(this.values));
  }

  /** Open the dialog; where a field is wrong, at that field. */
  open() {
    this.dialog.showModal();
    if (!this.form.checkValidity()) this.form.reportValidity();
  }

  /** Whether all fields can be sent. */
  get valid() {
    return this.form.checkValidity();
  }

  /** Return the fields of a request. */
  body() {
    const values = this.values;
    const body = { chat_template_kwargs: { enable_thinking: values.thinking } };
    for (const [name, field] of Object.entries(NUMBERS)) {
      const given = values[name] !== "" && !this.fields[name].disabled;
      if (given) body[field] = Number(values[name]);
    }
    if (values.tools.trim()) {
      body.tools = JSON.parse(values.tools);
      body.tool_choice = values.tool_choice;
    }
    return body;
  }

  /** Offer what the server says it does where a field is empty. */
  describe(model) {
    const limit = model.max_model_len;
    this.fields.max_tokens.max = limit;
    this.form.querySelector(".context").replaceChildren(
      el("span", {}, `The context of ${model.id} is ${limit.toLocaleString("en")} tokens.`),
    );
  }
}

function toolsProblem(text) {
  if (!text.trim()) return "";
  try {
    const tools = JSON.parse(text);
    const fits = Array.isArray(tools) && tools.every((tool) => tool?.function?.name);
    return fits ? "" : 'Give a list of {"type": "function", "function": {"name": …}}.';
  } catch (error) {
    return `This is not JSON: ${error.message}`;
  }
}
