//! Decoding while tokens arrive.

use super::{Result, Tokenizer};

/// What the decoder shows for bytes that are no character, or not yet one.
const INCOMPLETE: char = '\u{FFFD}';
/// Enough of the prompt for the decoder to see that the text goes on: a character has at most four bytes.
const CONTEXT: usize = 6;

/// Turns ids that arrive one at a time into text, and never gives out half a character.
#[derive(Clone, Debug)]
pub struct StreamDecoder<'t> {
    tokenizer: &'t Tokenizer,
    skip_special: bool,
    /// The last ids given out, then those that wait.
    ids: Vec<u32>,
    /// How many of `ids` were given out.
    shown: usize,
}

impl<'t> StreamDecoder<'t> {
    /// A decoder for what follows `prompt`. Without its last ids, a tokenizer that marks words by a leading space would
    /// lose the first one.
    pub fn new(tokenizer: &'t Tokenizer, prompt: &[u32], skip_special: bool) -> Self {
        let ids: Vec<u32> = prompt.iter().skip(prompt.len().saturating_sub(CONTEXT)).copied().collect();
        Self { tokenizer, skip_special, shown: ids.len(), ids }
    }

    /// Takes the next id; gives the text that is certain now, often none.
    ///
    /// # Errors
    /// When the tokenizer fails.
    pub fn push(&mut self, id: u32) -> Result<String> {
        self.ids.push(id);
        let text = self.tokenizer.decode(&self.ids, self.skip_special)?;
        if text.ends_with(INCOMPLETE) {
            return Ok(String::new());
        }
        let new = self.beyond_shown(&text)?;
        if !new.is_empty() {
            self.ids.drain(..self.shown);
            self.shown = self.ids.len();
        }
        Ok(new)
    }

    /// Gives what still waits; bytes that never became a character come out as `U+FFFD`.
    ///
    /// # Errors
    /// When the tokenizer fails.
    pub fn finish(self) -> Result<String> {
        let text = self.tokenizer.decode(&self.ids, self.skip_special)?;
        self.beyond_shown(&text)
    }

    fn beyond_shown(&self, text: &str) -> Result<String> {
        let shown = self.tokenizer.decode(self.ids.get(..self.shown).unwrap_or_default(), self.skip_special)?;
        let shown = shown.trim_end_matches(INCOMPLETE);
        Ok(text.strip_prefix(shown).unwrap_or_default().to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::testing::{shared, smollm2};

    const TEXT: &str = "Once, naïve 👍🏽 日本語\n\n  x";

    fn pieces(tokenizer: &Tokenizer, prompt: &[u32], ids: &[u32]) -> (Vec<String>, String) {
        let mut stream = tokenizer.stream(prompt, true);
        let pieces = ids.iter().map(|&id| stream.push(id).unwrap()).collect();
        (pieces, stream.finish().unwrap())
    }

    fn check(tokenizer: &Tokenizer) {
        let ids = tokenizer.encode(TEXT, false).unwrap();
        let (pieces, rest) = pieces(tokenizer, &[], &ids);
        assert_eq!(pieces.concat() + &rest, TEXT);
        assert!(pieces.iter().all(|piece| !piece.contains(INCOMPLETE)), "{pieces:?}");
        assert!(pieces.iter().filter(|piece| !piece.is_empty()).count() > 5, "it streams: {pieces:?}");
    }

    #[test]
    fn gives_whole_characters() {
        if let Some(gguf) = smollm2() {
            check(&Tokenizer::from_gguf(&gguf).unwrap());
        }
        if let Some(folder) = shared("models/stories260k") {
            check(&Tokenizer::from_folder(&folder).unwrap());
        }
    }

    #[test]
    fn the_first_word_keeps_its_space() {
        let Some(folder) = shared("models/stories260k") else { return };
        let tokenizer = Tokenizer::from_folder(&folder).unwrap();
        let prompt = tokenizer.encode("Once upon", true).unwrap();
        let rest = tokenizer.encode_continuation(" a time").unwrap();
        assert_eq!(pieces(&tokenizer, &prompt, &rest).0.concat(), " a time");
    }

    #[test]
    fn a_character_that_never_ends_is_shown_at_the_end() {
        let Some(folder) = shared("models/stories260k") else { return };
        let tokenizer = Tokenizer::from_folder(&folder).unwrap();
        let emoji = tokenizer.encode_continuation("a👍").unwrap();
        let (pieces, rest) = pieces(&tokenizer, &[], &emoji[..emoji.len() - 1]);
        assert_eq!(pieces.concat(), "a");
        assert!(rest.chars().all(|c| c == INCOMPLETE) && !rest.is_empty());
    }
}
