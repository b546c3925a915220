//! What may be chosen about how records become prompts and completions.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The prompt of a classification record, as a Jinja template over `text`.
pub const DEFAULT_TEMPLATE: &str = "{{ text }}\nlabel:";

/// How labels are spelled.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum LabelText {
    /// `card_arrival` is learnt as `card arrival`, which is closer to what the model has read.
    #[default]
    Spaces,
    /// As in the file.
    Verbatim,
}

/// When the chat template is used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ChatUse {
    /// Where the tokenizer has one.
    #[default]
    Auto,
    /// Not at all: prompt and completion are plain text.
    Never,
}

/// What may be chosen about how records become examples.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct FormatOptions {
    /// The prompt of a classification record, a Jinja template over `text`.
    pub template: String,
    /// The prompt of a completion record, a Jinja template over `prompt`, or of an alpaca record, over `instruction` and
    /// `input` (empty where there is none). Where not given, the prompt as it is, or instruction and input in lines of their
    /// own.
    pub prompt_template: Option<String>,
    /// How labels are spelled.
    pub labels: LabelText,
    /// When the chat template is used.
    pub chat: ChatUse,
    /// A system prompt: the first message where a conversation has none of its own, or a paragraph before a plain prompt.
    pub system: Option<String>,
    /// The chat template, in the place of the model's own: Jinja, or the path of a file that ends in `.jinja`.
    pub chat_template: Option<String>,
    /// The roles whose messages are learnt in a conversation, each with the token that ends its turn; the assistant's
    /// where empty. What follows the last of them is left out; a conversation that ends so is refused where this is empty.
    pub train_on: Vec<String>,
    /// Learn the last message of these roles only.
    pub mask_history: bool,
    /// Learn the prompt too, all but its first token.
    pub train_on_prompt: bool,
}

impl Default for FormatOptions {
    fn default() -> Self {
        Self {
            template: DEFAULT_TEMPLATE.into(),
            prompt_template: None,
            labels: LabelText::default(),
            chat: ChatUse::default(),
            system: None,
            chat_template: None,
            train_on: Vec::new(),
            mask_history: false,
            train_on_prompt: false,
        }
    }
}
