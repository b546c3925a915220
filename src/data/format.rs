//! A record as a prompt and a completion in token ids.

use minijinja::Environment;
use serde::{Deserialize, Serialize};

use super::{Error, Record, Result};
use crate::base::{ChatTemplate, Message, Tokenizer};

/// The prompt of a classification record, as a Jinja template over `text`.
pub const DEFAULT_TEMPLATE: &str = "{{ text }}\nlabel:";

const TEMPLATE: &str = "prompt";

/// How labels are spelled.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LabelText {
    /// `card_arrival` is learnt as `card arrival`, which is closer to what the model has read.
    #[default]
    Spaces,
    /// As in the file.
    Verbatim,
}

/// When the chat template is used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ChatUse {
    /// Where the tokenizer has one.
    #[default]
    Auto,
    /// Not at all: prompt and completion are plain text.
    Never,
}

/// What may be chosen about a [`Format`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct FormatOptions {
    /// The prompt of a classification record.
    pub template: String,
    /// How labels are spelled.
    pub labels: LabelText,
    /// When the chat template is used.
    pub chat: ChatUse,
    /// A system prompt: the first message where a conversation has none of its own, or a paragraph before a plain prompt.
    pub system: Option<String>,
}

impl Default for FormatOptions {
    fn default() -> Self {
        Self { template: DEFAULT_TEMPLATE.into(), labels: LabelText::default(), chat: ChatUse::default(), system: None }
    }
}

/// A prompt and what is learnt to follow it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Example {
    /// What is given; at least one token.
    pub prompt_ids: Vec<u32>,
    /// What is learnt; ends with the token that ends the turn or the text.
    pub completion_ids: Vec<u32>,
    /// The class as the file spells it, for a classification record.
    pub label: Option<String>,
}

/// Turns records into examples, and texts into the prompts that training saw.
///
/// | record | with a chat template | without |
/// |---|---|---|
/// | classification | user: the template; assistant: the label | the template, then `" label"` |
/// | completion | user: the prompt; assistant: the completion | the prompt, then the completion, both as they are |
/// | chat | the messages; the last is learnt | an error |
///
/// Prompt and completion are tokenised apart, so that a prompt has the same ids in training and in use.
#[derive(Debug)]
pub struct Format<'t> {
    tokenizer: &'t Tokenizer,
    vocab_size: usize,
    options: FormatOptions,
    environment: Environment<'static>,
}

impl<'t> Format<'t> {
    /// A format for a model with `vocab_size` embeddings.
    ///
    /// # Errors
    /// When the template does not parse.
    pub fn new(tokenizer: &'t Tokenizer, vocab_size: usize, options: FormatOptions) -> Result<Self> {
        let mut environment = Environment::new();
        environment.set_undefined_behavior(minijinja::UndefinedBehavior::Strict);
        environment.add_template_owned(TEMPLATE, options.template.clone()).map_err(template_error)?;
        Ok(Self { tokenizer, vocab_size, options, environment })
    }

    /// The choices in force.
    pub fn options(&self) -> &FormatOptions {
        &self.options
    }

    /// The tokenizer.
    pub fn tokenizer(&self) -> &'t Tokenizer {
        self.tokenizer
    }

    /// Whether the chat template is used.
    pub fn uses_chat(&self) -> bool {
        self.chat().is_some()
    }

    /// The id that fills up short rows. It is masked; any id of the vocabulary would do.
    pub fn pad(&self) -> u32 {
        self.tokenizer.pad().or(self.tokenizer.eos()).filter(|&id| (id as usize) < self.vocab_size).unwrap_or(0)
    }

    /// A record in token ids, of whatever length.
    ///
    /// # Errors
    /// When a template refuses it, when it is a conversation and no chat template is used, or when a token is outside the
    /// model's vocabulary.
    pub fn example(&self, record: &Record) -> Result<Example> {
        match record {
            Record::Classification { text, label } => {
                let words = self.label_text(label);
                let prompt = self.classification_text(text)?;
                // Without a chat template nothing but this space parts the label from the prompt.
                let plain = format!(" {words}");
                let (prompt_ids, completion_ids) = self.pair(&prompt, &words, &plain)?;
                Ok(Example { prompt_ids, completion_ids, label: Some(label.clone()) })
            }
            Record::Completion { prompt, completion } => {
                let (prompt_ids, completion_ids) = self.pair(prompt, completion, completion)?;
                Ok(Example { prompt_ids, completion_ids, label: None })
            }
            Record::Chat { messages } => {
                let template = self.chat().ok_or_else(|| self.no_chat_template())?;
                let Some((last, before)) = messages.split_last() else { return Err(Error::EmptyPrompt) };
                let (prompt_ids, completion_ids) = self.turn(template, before.to_vec(), &last.content)?;
                Ok(Example { prompt_ids, completion_ids, label: None })
            }
        }
    }

    /// The prompt that a classification record with this text has.
    ///
    /// # Errors
    /// As [`example`](Self::example).
    pub fn classification_prompt(&self, text: &str) -> Result<Vec<u32>> {
        self.completion_prompt(&self.classification_text(text)?)
    }

    /// The prompt that a completion record with this prompt has.
    ///
    /// # Errors
    /// As [`example`](Self::example).
    pub fn completion_prompt(&self, prompt: &str) -> Result<Vec<u32>> {
        match self.chat() {
            Some(template) => self.rendered_prompt(template, &self.with_system(vec![user(prompt)])).map(|(_, ids)| ids),
            None => self.plain_prompt(prompt),
        }
    }

    /// The prompt that a conversation gives, up to where the assistant answers.
    ///
    /// # Errors
    /// As [`example`](Self::example).
    pub fn chat_prompt(&self, messages: &[Message]) -> Result<Vec<u32>> {
        let template = self.chat().ok_or_else(|| self.no_chat_template())?;
        self.rendered_prompt(template, &self.with_system(messages.to_vec())).map(|(_, ids)| ids)
    }

    /// A label as it is learnt.
    pub fn label_text(&self, label: &str) -> String {
        match self.options.labels {
            LabelText::Spaces => label.replace('_', " "),
            LabelText::Verbatim => label.into(),
        }
    }

    fn chat(&self) -> Option<&'t ChatTemplate> {
        self.tokenizer.chat_template().filter(|_| self.options.chat == ChatUse::Auto)
    }

    fn no_chat_template(&self) -> Error {
        let why = match self.options.chat {
            ChatUse::Auto => "the tokenizer has no chat template",
            ChatUse::Never => "the use of the chat template is switched off",
        };
        Error::NoChatTemplate { why }
    }

    fn classification_text(&self, text: &str) -> Result<String> {
        let template = self.environment.get_template(TEMPLATE).map_err(template_error)?;
        template.render(minijinja::context! { text }).map_err(template_error)
    }

    fn pair(&self, prompt: &str, answer: &str, plain: &str) -> Result<(Vec<u32>, Vec<u32>)> {
        match self.chat() {
            Some(template) => self.turn(template, vec![user(prompt)], answer),
            None => Ok((self.plain_prompt(prompt)?, self.ended(self.continuation(plain)?))),
        }
    }

    fn plain_prompt(&self, prompt: &str) -> Result<Vec<u32>> {
        let text = match &self.options.system {
            Some(system) => format!("{system}\n\n{prompt}"),
            None => prompt.to_string(),
        };
        let mut ids = self.tokenizer.encode(&text, true)?;
        // A tokenizer that ends every text with a token would end the prompt before its completion.
        if ids.last().is_some_and(|&id| self.tokenizer.is_eos(id)) {
            let bare = self.tokenizer.encode(&text, false)?;
            if bare.last() != ids.last() {
                ids.pop();
            }
        }
        self.checked_prompt(&text, ids)
    }

    fn with_system(&self, mut messages: Vec<Message>) -> Vec<Message> {
        let has_own = messages.first().is_some_and(|message| message.role == "system");
        if let Some(system) = self.options.system.as_ref().filter(|_| !has_own) {
            messages.insert(0, Message::new("system", system));
        }
        messages
    }

    /// A conversation's text and ids up to the answer.
    fn rendered_prompt(&self, template: &ChatTemplate, messages: &[Message]) -> Result<(String, Vec<u32>)> {
        let text = template.render(messages, true)?;
        let ids = self.tokenizer.encode(&text, false)?;
        let ids = self.checked_prompt(&text, ids)?;
        Ok((text, ids))
    }

    /// The prompt and the answer that follows it. The answer is what the whole conversation has beyond the prompt; where
    /// a template writes an answered turn differently, it is the answer alone.
    fn turn(&self, template: &ChatTemplate, before: Vec<Message>, answer: &str) -> Result<(Vec<u32>, Vec<u32>)> {
        let mut messages = self.with_system(before);
        let (prompt, prompt_ids) = self.rendered_prompt(template, &messages)?;
        messages.push(Message::new("assistant", answer));
        let whole = template.render(&messages, false)?;
        let rest = whole.strip_prefix(&prompt).filter(|rest| rest.contains(answer.trim()));
        let completion_ids = match rest {
            Some(rest) => self.until_end_of_turn(rest)?,
            None => self.ended(self.continuation(answer)?),
        };
        Ok((prompt_ids, completion_ids))
    }

    /// Cuts what a template writes after the token that ends the turn, such as a line break before the next one.
    fn until_end_of_turn(&self, rest: &str) -> Result<Vec<u32>> {
        let mut ids = self.continuation(rest)?;
        if let Some(end) = ids.iter().rposition(|&id| self.tokenizer.is_eos(id)) {
            let after = self.tokenizer.decode(ids.get(end + 1..).unwrap_or_default(), true)?;
            if after.trim().is_empty() {
                ids.truncate(end + 1);
                return Ok(ids);
            }
        }
        let ids = self.continuation(rest.trim_end())?;
        match ids.last() {
            // The turn ends with a token that the checkpoint does not list among those that end generation.
            Some(&last) if self.tokenizer.is_special(last) => Ok(ids),
            _ => Ok(self.ended(ids)),
        }
    }

    fn continuation(&self, text: &str) -> Result<Vec<u32>> {
        let ids = self.tokenizer.encode_continuation(text)?;
        self.tokenizer.check_vocabulary(text, &ids, self.vocab_size)?;
        Ok(ids)
    }

    fn ended(&self, mut ids: Vec<u32>) -> Vec<u32> {
        ids.extend(self.tokenizer.eos());
        ids
    }

    /// A model predicts from at least one token.
    fn checked_prompt(&self, text: &str, mut ids: Vec<u32>) -> Result<Vec<u32>> {
        self.tokenizer.check_vocabulary(text, &ids, self.vocab_size)?;
        if ids.is_empty() {
            ids.push(self.tokenizer.bos().or(self.tokenizer.eos()).ok_or(Error::EmptyPrompt)?);
        }
        Ok(ids)
    }
}

fn user(text: &str) -> Message {
    Message::new("user", text)
}

fn template_error(error: minijinja::Error) -> Error {
    Error::Template { reason: error.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::testing::{CHATML, ascii_tokenizer, shared, smollm2};

    fn classification() -> Record {
        Record::Classification { text: "Where is it?".into(), label: "card_arrival".into() }
    }

    /// Prompt and completion as text, special tokens included.
    fn shown(tokenizer: &Tokenizer, options: FormatOptions, record: &Record) -> (String, String) {
        let format = Format::new(tokenizer, tokenizer.vocab_size(), options).unwrap();
        let example = format.example(record).unwrap();
        let text = |ids: &[u32]| tokenizer.decode(ids, false).unwrap();
        (text(&example.prompt_ids), text(&example.completion_ids))
    }

    fn pair(prompt: &str, completion: &str) -> (String, String) {
        (prompt.into(), completion.into())
    }

    #[test]
    fn plain_classification_is_text_label_and_end() {
        let tokenizer = ascii_tokenizer(None);
        let options = FormatOptions::default();
        let expected = pair("<s>Where is it?\nlabel:", " card arrival</s>");
        assert_eq!(shown(&tokenizer, options.clone(), &classification()), expected);
        let format = Format::new(&tokenizer, 1000, options).unwrap();
        let example = format.example(&classification()).unwrap();
        assert_eq!(example.label.as_deref(), Some("card_arrival"));
        assert_eq!(example.prompt_ids, format.classification_prompt("Where is it?").unwrap());
    }

    #[test]
    fn the_options_are_heard() {
        let options = FormatOptions {
            template: "Q: {{ text | upper }}".into(),
            labels: LabelText::Verbatim,
            chat: ChatUse::Never,
            system: Some("Sort.".into()),
        };
        let expected = pair("<s>Sort.\n\nQ: WHERE IS IT?", " card_arrival<|im_end|>");
        assert_eq!(shown(&ascii_tokenizer(Some(CHATML)), options, &classification()), expected);
        let error = |template: &str| {
            let options = FormatOptions { template: template.into(), ..FormatOptions::default() };
            let tokenizer = ascii_tokenizer(None);
            let format = Format::new(&tokenizer, 1000, options)?;
            format.example(&classification())
        };
        assert!(matches!(error("{{ text"), Err(Error::Template { .. })));
        assert!(matches!(error("{{ txet }}"), Err(Error::Template { .. })), "an unknown name is no empty text");
    }

    #[test]
    fn a_chat_template_makes_turns_that_end_with_the_end_of_turn() {
        let tokenizer = ascii_tokenizer(Some(CHATML));
        let user = "<|im_start|>user\nWhere is it?\nlabel:<|im_end|>\n<|im_start|>assistant\n";
        let expected = pair(user, "card arrival<|im_end|>");
        assert_eq!(shown(&tokenizer, FormatOptions::default(), &classification()), expected);
        let completion = Record::Completion { prompt: "p".into(), completion: " c".into() };
        let expected = pair("<|im_start|>user\np<|im_end|>\n<|im_start|>assistant\n", " c<|im_end|>");
        assert_eq!(shown(&tokenizer, FormatOptions::default(), &completion), expected);
    }

    #[test]
    fn the_last_message_is_learnt_and_an_own_system_message_stays() {
        let tokenizer = ascii_tokenizer(Some(CHATML));
        let options = FormatOptions { system: Some("S".into()), ..FormatOptions::default() };
        let turns = |first: &str| Record::Chat {
            messages: vec![Message::new(first, "a"), Message::new("user", "b"), Message::new("assistant", "c")],
        };
        let rest = "<|im_start|>user\nb<|im_end|>\n<|im_start|>assistant\n";
        let own = pair(&format!("<|im_start|>system\na<|im_end|>\n{rest}"), "c<|im_end|>");
        assert_eq!(shown(&tokenizer, options.clone(), &turns("system")), own);
        let added = format!("<|im_start|>system\nS<|im_end|>\n<|im_start|>user\na<|im_end|>\n{rest}");
        assert_eq!(shown(&tokenizer, options, &turns("user")).0, added);
        let plain = ascii_tokenizer(None);
        let format = Format::new(&plain, 1000, FormatOptions::default()).unwrap();
        assert!(matches!(format.example(&turns("user")), Err(Error::NoChatTemplate { .. })));
    }

    /// Templates need not write an answer as the prompt announced it, nor end it with a token.
    #[test]
    fn odd_templates_still_give_an_ended_completion() {
        let odd = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}(think){% \
                   endif %}";
        let tokenizer = ascii_tokenizer(Some(odd));
        let expected = pair("[user]Where is it?\nlabel:(think)", "card arrival<|im_end|>");
        assert_eq!(shown(&tokenizer, FormatOptions::default(), &classification()), expected);
        let unended = "{% for m in messages %}{{ m.content }}|{% endfor %}";
        let expected = pair("Where is it?\nlabel:|", "card arrival|<|im_end|>");
        assert_eq!(shown(&ascii_tokenizer(Some(unended)), FormatOptions::default(), &classification()), expected);
    }

    #[test]
    fn a_prompt_has_at_least_one_token_and_only_known_ones() {
        let tokenizer = ascii_tokenizer(None);
        let empty = Record::Completion { prompt: String::new(), completion: "c".into() };
        assert_eq!(shown(&tokenizer, FormatOptions::default(), &empty), pair("<s>", "c</s>"));
        let format = Format::new(&tokenizer, 10, FormatOptions::default()).unwrap();
        assert!(matches!(format.example(&empty), Err(Error::Base(crate::base::Error::Vocabulary { .. }))));
        assert!(format.pad() < 10);
    }

    /// The ids of the prompt are those that transformers' tokenizer gives for the rendered conversation.
    #[test]
    fn smollm2_prompts_have_the_reference_ids() {
        let Some(gguf) = smollm2() else { return };
        let tokenizer = Tokenizer::from_gguf(&gguf).unwrap();
        let format = Format::new(&tokenizer, 49152, FormatOptions::default()).unwrap();
        let record = Record::Completion { prompt: "What is gravity?".into(), completion: "A force.".into() };
        let example = format.example(&record).unwrap();
        // <|im_start|>user\nWhat is gravity?<|im_end|>\n<|im_start|>assistant\n, after the default system message
        assert!(example.prompt_ids.ends_with(&[1, 4093, 198, 1780, 314, 9354, 47, 2, 198, 1, 520, 9531, 198]));
        assert_eq!(tokenizer.decode(&example.completion_ids, false).unwrap(), "A force.<|im_end|>");
        assert_eq!(example.completion_ids.last(), Some(&2));
    }

    #[test]
    fn a_sentence_piece_completion_joins_without_a_second_space() {
        let Some(folder) = shared("models/stories260k") else { return };
        let tokenizer = Tokenizer::from_folder(&folder).unwrap();
        let format = Format::new(&tokenizer, 512, FormatOptions::default()).unwrap();
        let record = Record::Completion { prompt: "Once upon".into(), completion: " a time".into() };
        let example = format.example(&record).unwrap();
        let joined = [example.prompt_ids, example.completion_ids].concat();
        assert_eq!(joined, [1, 403, 407, 261, 378, 2]);
    }
}
