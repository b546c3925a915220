//! A record as a prompt and a completion in token ids.

use minijinja::Environment;

use super::record::Prompt;
use super::{ChatUse, Error, Example, FormatOptions, LabelText, Record, Result};
use crate::base::{ChatTemplate, Message, Tokenizer};

const TEMPLATE: &str = "template";
const PROMPT_TEMPLATE: &str = "prompt_template";

/// Turns records into examples, and texts into the prompts that training saw.
///
/// | record | with a chat template | without |
/// |---|---|---|
/// | classification | user: the template; assistant: the label | the template, then `" label"` |
/// | completion, alpaca | user: the prompt; assistant: the completion | the prompt, then the completion, both as they are |
/// | text | the text | the text |
/// | messages, sharegpt | the messages; the assistant's are learnt, or those of chosen roles | an error |
/// | preference | two examples: the prompt with the chosen and with the rejected answer | the same, as texts |
///
/// What is given and what is learnt are tokenised apart, so that no token holds both, and a prompt has the same ids in
/// training and in use.
#[derive(Debug)]
pub struct Format<'t> {
    tokenizer: &'t Tokenizer,
    vocab_size: usize,
    options: FormatOptions,
    /// The one of the options, in the place of the tokenizer's.
    chat_template: Option<ChatTemplate>,
    environment: Environment<'static>,
}

impl<'t> Format<'t> {
    /// A format for a model with `vocab_size` embeddings.
    ///
    /// # Errors
    /// When a template does not parse.
    pub fn new(tokenizer: &'t Tokenizer, vocab_size: usize, options: FormatOptions) -> Result<Self> {
        let mut environment = Environment::new();
        environment.set_undefined_behavior(minijinja::UndefinedBehavior::Strict);
        let sources = [(TEMPLATE, Some(&options.template)), (PROMPT_TEMPLATE, options.prompt_template.as_ref())];
        for (name, source) in sources {
            let Some(source) = source else { continue };
            environment.add_template_owned(name, source.clone()).map_err(template_error(name))?;
        }
        let source = options.chat_template.as_deref().map(template_source).transpose()?;
        let token = |id: Option<u32>| id.and_then(|id| tokenizer.token(id));
        let (bos, eos) = (token(tokenizer.bos()), token(tokenizer.eos()));
        let compiled = source.map(|source| ChatTemplate::new(&source, bos.as_deref(), eos.as_deref()));
        Ok(Self { tokenizer, vocab_size, options, chat_template: compiled.transpose()?, environment })
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

    /// A record in token ids, of whatever length: one example, two for a preference record (the chosen answer's first), or
    /// none where the record holds nothing to learn.
    ///
    /// # Errors
    /// When a template refuses it, when it is a conversation and no chat template is used, or when a token is outside the
    /// model's vocabulary.
    pub fn examples(&self, record: &Record) -> Result<Vec<Example>> {
        let mut examples = match record {
            Record::Classification { text, label } => {
                let words = self.label_text(label);
                let prompt = self.classification_text(text)?;
                // Without a chat template nothing but this space parts the label from the prompt.
                let plain = format!(" {words}");
                let example = self.pair(&prompt, None, &words, &plain)?;
                vec![Example { label: Some(label.clone()), ..example }]
            }
            Record::Completion { prompt, completion, system } => {
                let prompt = self.prompt_text(prompt, || minijinja::context! { prompt })?;
                vec![self.pair(&prompt, system.as_deref(), completion, completion)?]
            }
            Record::Instruction { instruction, input, output, system } => {
                let joined = if input.is_empty() { instruction.clone() } else { format!("{instruction}\n{input}") };
                let prompt = self.prompt_text(&joined, || minijinja::context! { instruction, input })?;
                let plain = if self.options.prompt_template.is_some() { output.clone() } else { format!("\n{output}") };
                vec![self.pair(&prompt, system.as_deref(), output, &plain)?]
            }
            Record::Text { text } => self.whole_text(text)?.into_iter().collect(),
            Record::Chat { messages } => {
                let template = self.chat().ok_or_else(|| self.no_chat_template())?;
                self.conversation(template, messages)?.into_iter().collect()
            }
            Record::Preference { prompt, chosen, rejected, system } => {
                let answer = |answer: &str| match prompt {
                    Prompt::Text(text) => self.pair(text, system.as_deref(), answer, answer),
                    Prompt::Messages(messages) => {
                        let template = self.chat().ok_or_else(|| self.no_chat_template())?;
                        self.turn(template, &self.with_system(messages.clone(), None), answer)
                    }
                };
                return Ok(vec![answer(chosen)?, answer(rejected)?]);
            }
        };
        if self.options.train_on_prompt {
            for example in &mut examples {
                example.prompt_mask = (0..example.prompt_ids.len()).map(|index| index > 0).collect();
            }
        }
        Ok(examples)
    }

    /// The prompt that a classification record with this text has.
    ///
    /// # Errors
    /// As [`examples`](Self::examples).
    pub fn classification_prompt(&self, text: &str) -> Result<Vec<u32>> {
        self.completion_prompt(&self.classification_text(text)?)
    }

    /// The prompt that a completion record with this prompt has.
    ///
    /// # Errors
    /// As [`examples`](Self::examples).
    pub fn completion_prompt(&self, prompt: &str) -> Result<Vec<u32>> {
        match self.chat() {
            Some(template) => self.rendered_prompt(template, &self.with_system(vec![user(prompt)], None)),
            None => self.plain_prompt(prompt, None),
        }
    }

    /// The prompt that a conversation gives, up to where the assistant answers.
    ///
    /// # Errors
    /// As [`examples`](Self::examples).
    pub fn chat_prompt(&self, messages: &[Message]) -> Result<Vec<u32>> {
        let template = self.chat().ok_or_else(|| self.no_chat_template())?;
        self.rendered_prompt(template, &self.with_system(messages.to_vec(), None))
    }

    /// A label as it is learnt.
    pub fn label_text(&self, label: &str) -> String {
        match self.options.labels {
            LabelText::Spaces => label.replace('_', " "),
            LabelText::Verbatim => label.into(),
        }
    }

    fn chat(&self) -> Option<&ChatTemplate> {
        let template = self.chat_template.as_ref().or(self.tokenizer.chat_template());
        template.filter(|_| self.options.chat == ChatUse::Auto)
    }

    fn no_chat_template(&self) -> Error {
        let why = match self.options.chat {
            ChatUse::Auto => "the tokenizer has no chat template",
            ChatUse::Never => "the use of the chat template is switched off",
        };
        Error::NoChatTemplate { why }
    }

    fn classification_text(&self, text: &str) -> Result<String> {
        self.render(TEMPLATE, minijinja::context! { text })
    }

    /// The prompt as it is, or as the template makes it.
    fn prompt_text(&self, plain: &str, context: impl FnOnce() -> minijinja::Value) -> Result<String> {
        match self.options.prompt_template {
            Some(_) => self.render(PROMPT_TEMPLATE, context()),
            None => Ok(plain.into()),
        }
    }

    fn render(&self, name: &'static str, context: minijinja::Value) -> Result<String> {
        let template = self.environment.get_template(name).map_err(template_error(name))?;
        template.render(context).map_err(template_error(name))
    }

    /// A prompt and its answer, `plain` where there is no chat template.
    fn pair(&self, prompt: &str, system: Option<&str>, answer: &str, plain: &str) -> Result<Example> {
        match self.chat() {
            Some(template) => self.turn(template, &self.with_system(vec![user(prompt)], system), answer),
            None => {
                let (prompt_ids, completion_ids) =
                    (self.plain_prompt(prompt, system)?, self.ended(self.continuation(plain)?));
                Ok(Example { prompt_ids, completion_ids, ..Example::default() })
            }
        }
    }

    fn plain_prompt(&self, prompt: &str, system: Option<&str>) -> Result<Vec<u32>> {
        let text = match system.or(self.options.system.as_deref()) {
            Some(system) => format!("{system}\n\n{prompt}"),
            None => prompt.to_string(),
        };
        let ids = self.begun(&text)?;
        self.checked_prompt(&text, ids)
    }

    /// The ids of a text that has a beginning and no end.
    fn begun(&self, text: &str) -> Result<Vec<u32>> {
        let mut ids = self.tokenizer.encode(text, true)?;
        // A tokenizer that ends every text with a token would end the prompt before its completion.
        if ids.last().is_some_and(|&id| self.tokenizer.is_eos(id)) {
            let bare = self.tokenizer.encode(text, false)?;
            if bare.last() != ids.last() {
                ids.pop();
            }
        }
        Ok(ids)
    }

    /// A text of which all but the first token is learnt; `None` for an empty one.
    fn whole_text(&self, text: &str) -> Result<Option<Example>> {
        if text.trim().is_empty() {
            return Ok(None);
        }
        let mut ids = self.begun(text)?;
        self.tokenizer.check_vocabulary(text, &ids, self.vocab_size)?;
        if ids.is_empty() {
            return Ok(None);
        }
        let completion_ids = self.ended(ids.split_off(1));
        Ok((!completion_ids.is_empty()).then(|| Example { prompt_ids: ids, completion_ids, ..Example::default() }))
    }

    /// The conversation with a system prompt: its own, else the record's, else the option's.
    pub(super) fn with_system(&self, mut messages: Vec<Message>, system: Option<&str>) -> Vec<Message> {
        let has_own = messages.first().is_some_and(|message| message.role == "system");
        if let Some(system) = system.or(self.options.system.as_deref()).filter(|_| !has_own) {
            messages.insert(0, Message::new("system", system));
        }
        messages
    }

    /// A conversation's ids up to the answer.
    fn rendered_prompt(&self, template: &ChatTemplate, messages: &[Message]) -> Result<Vec<u32>> {
        self.rendered_ids(&template.render(messages, true)?)
    }

    /// The ids of a rendered conversation, in which the template wrote every special token.
    pub(super) fn rendered_ids(&self, text: &str) -> Result<Vec<u32>> {
        let ids = self.tokenizer.encode(text, false)?;
        self.checked_prompt(text, ids)
    }

    pub(super) fn continuation(&self, text: &str) -> Result<Vec<u32>> {
        let ids = self.tokenizer.encode_continuation(text)?;
        self.tokenizer.check_vocabulary(text, &ids, self.vocab_size)?;
        Ok(ids)
    }

    pub(super) fn ended(&self, mut ids: Vec<u32>) -> Vec<u32> {
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

/// A template that is given as its source or as a file.
fn template_source(given: &str) -> Result<String> {
    if !given.trim_end().ends_with(".jinja") {
        return Ok(given.into());
    }
    let path = std::path::Path::new(given.trim());
    let bytes = crate::files::read(path)?;
    let invalid = |_| Error::Option {
        option: "format.chat_template",
        reason: format!("names {}, which is not UTF-8", path.display()),
        help: "save it as UTF-8",
    };
    String::from_utf8(bytes).map_err(invalid)
}

fn template_error(option: &'static str) -> impl Fn(minijinja::Error) -> Error {
    move |error| {
        let variables = match option {
            TEMPLATE => "`text`",
            _ => "`prompt`, or for alpaca records `instruction` and `input`",
        };
        Error::Template { option, reason: error.to_string(), variables }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::testing::{CHATML, ascii_tokenizer, shared, smollm2};

    fn classification() -> Record {
        Record::Classification { text: "Where is it?".into(), label: "card_arrival".into() }
    }

    fn completion(prompt: impl Into<String>, completion: impl Into<String>) -> Record {
        Record::Completion { prompt: prompt.into(), completion: completion.into(), system: None }
    }

    fn single(format: &Format<'_>, record: &Record) -> Result<Example> {
        format.examples(record).map(|mut examples| examples.remove(0))
    }

    /// Prompt and completion as text, special tokens included.
    fn shown(tokenizer: &Tokenizer, options: FormatOptions, record: &Record) -> (String, String) {
        let format = Format::new(tokenizer, tokenizer.vocab_size(), options).unwrap();
        let example = single(&format, record).unwrap();
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
        let example = single(&format, &classification()).unwrap();
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
            ..FormatOptions::default()
        };
        let expected = pair("<s>Sort.\n\nQ: WHERE IS IT?", " card_arrival<|im_end|>");
        assert_eq!(shown(&ascii_tokenizer(Some(CHATML)), options, &classification()), expected);
        let error = |template: &str| {
            let options = FormatOptions { template: template.into(), ..FormatOptions::default() };
            let tokenizer = ascii_tokenizer(None);
            let format = Format::new(&tokenizer, 1000, options)?;
            single(&format, &classification())
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
        let record = completion("p", " c");
        let expected = pair("<|im_start|>user\np<|im_end|>\n<|im_start|>assistant\n", " c<|im_end|>");
        assert_eq!(shown(&tokenizer, FormatOptions::default(), &record), expected);
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
        assert!(matches!(single(&format, &turns("user")), Err(Error::NoChatTemplate { .. })));
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
        let empty = completion(String::new(), "c");
        assert_eq!(shown(&tokenizer, FormatOptions::default(), &empty), pair("<s>", "c</s>"));
        let format = Format::new(&tokenizer, 10, FormatOptions::default()).unwrap();
        assert!(matches!(single(&format, &empty), Err(Error::Base(crate::base::Error::Vocabulary { .. }))));
        assert!(format.pad() < 10);
    }

    /// The ids of the prompt are those that transformers' tokenizer gives for the rendered conversation.
    #[test]
    fn smollm2_prompts_have_the_reference_ids() {
        let Some(gguf) = smollm2() else { return };
        let tokenizer = Tokenizer::from_gguf(&gguf).unwrap();
        let format = Format::new(&tokenizer, 49152, FormatOptions::default()).unwrap();
        let record = completion("What is gravity?", "A force.");
        let example = single(&format, &record).unwrap();
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
        let record = completion("Once upon", " a time");
        let example = single(&format, &record).unwrap();
        let joined = [example.prompt_ids, example.completion_ids].concat();
        assert_eq!(joined, [1, 403, 407, 261, 378, 2]);
    }
}
