//! Examples that are longer than a sequence may be.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::Example;

/// What becomes of an example that is too long.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Truncation {
    /// The prompt loses its beginning, all but the token that begins a text. Where the completion leaves no room for one
    /// token of prompt, the record is dropped. A text without a prompt loses its end.
    #[default]
    Left,
    /// The completion loses its end, and with it the token that ends the text. Where the prompt leaves no room for one token
    /// of completion, the record is dropped.
    Right,
    /// The record is dropped.
    Drop,
}

impl std::str::FromStr for Truncation {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "left" => Ok(Self::Left),
            "right" => Ok(Self::Right),
            "drop" => Ok(Self::Drop),
            _ => Err("is none of left, right, drop".into()),
        }
    }
}

/// Why a record is not used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum DropReason {
    /// It is longer than a sequence may be, and may not be cut.
    TooLong,
    /// Its completion leaves no room for a token of prompt.
    CompletionTooLong,
    /// Its prompt leaves no room for a token of completion.
    PromptTooLong,
    /// It has no message of a role that is learnt, or its text is empty.
    NothingToLearn,
    /// The chosen and the rejected answer have the same tokens.
    SameAnswers,
}

impl DropReason {
    /// The reason as the rest of a sentence about records.
    pub fn text(self) -> &'static str {
        match self {
            Self::TooLong => "too long as a whole",
            Self::CompletionTooLong => "a completion that leaves no room for a prompt",
            Self::PromptTooLong => "a prompt that leaves no room for a completion",
            Self::NothingToLearn => "nothing to learn in them",
            Self::SameAnswers => "the same chosen and rejected answer",
        }
    }
}

/// What cutting took away.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Cut {
    /// Tokens.
    pub tokens: usize,
    /// Tokens that would have been learnt.
    pub labels: usize,
}

impl Truncation {
    /// Makes a group of examples fit. The prompts of a pair are the same, and stay so.
    pub(super) fn fit(self, group: &mut [Example], max_seq_len: usize, bos: Option<u32>) -> Result<Cut, DropReason> {
        let labels = |group: &[Example]| group.iter().map(Example::labelled).sum::<usize>();
        let tokens = |group: &[Example]| group.iter().map(Example::len).sum::<usize>();
        if group.iter().all(|example| example.len() <= max_seq_len) {
            return Ok(Cut::default());
        }
        let before = (tokens(group), labels(group));
        match self {
            Self::Drop => return Err(DropReason::TooLong),
            // one token that begins the text is no prompt
            Self::Left if group.iter().any(|example| example.prompt_ids.len() > 1) => {
                let longest = group.iter().map(|example| example.completion_ids.len()).max().unwrap_or(0);
                let room = max_seq_len.checked_sub(longest).filter(|&room| room > 0);
                let room = room.ok_or(DropReason::CompletionTooLong)?;
                group.iter_mut().for_each(|example| example.keep_end(room, bos));
            }
            Self::Left | Self::Right => {
                for example in group.iter_mut() {
                    let room = max_seq_len.checked_sub(example.prompt_ids.len()).filter(|&room| room > 0);
                    example.completion_ids.truncate(room.ok_or(DropReason::PromptTooLong)?);
                }
            }
        }
        Ok(Cut { tokens: before.0 - tokens(group), labels: before.1 - labels(group) })
    }
}

impl Example {
    /// Cuts the prompt to `room` tokens from the left, but keeps the token that begins a text.
    fn keep_end(&mut self, room: usize, bos: Option<u32>) {
        let excess = self.prompt_ids.len().saturating_sub(room);
        let kept = usize::from(room > 1 && bos.is_some() && self.prompt_ids.first().copied() == bos);
        self.prompt_ids.drain(kept..kept + excess);
        if !self.prompt_mask.is_empty() {
            self.prompt_mask.drain(kept..kept + excess);
        }
        if let Some(first) = self.prompt_mask.first_mut() {
            *first = false;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example(prompt: &[u32], mask: &[bool], completion: &[u32]) -> Example {
        let (prompt_ids, prompt_mask) = (prompt.to_vec(), mask.to_vec());
        Example { prompt_ids, prompt_mask, completion_ids: completion.to_vec(), label: None }
    }

    fn fit(truncation: Truncation, mut group: Vec<Example>, length: usize) -> (Vec<Example>, Result<Cut, DropReason>) {
        let cut = truncation.fit(&mut group, length, Some(1));
        (group, cut)
    }

    #[test]
    fn left_cuts_prompts_and_their_labels() {
        let long = example(&[1, 2, 3, 4, 5], &[false, true, true, true, false], &[6, 7]);
        let (group, cut) = fit(Truncation::Left, vec![long.clone()], 5);
        assert_eq!(group, [example(&[1, 4, 5], &[false, true, false], &[6, 7])]);
        assert_eq!(cut, Ok(Cut { tokens: 2, labels: 2 }));
        // the first token of a row is never learnt
        let (group, cut) = fit(Truncation::Left, vec![example(&[2, 3, 4], &[false, true, true], &[6, 7])], 4);
        assert_eq!((group, cut), (vec![example(&[3, 4], &[false, true], &[6, 7])], Ok(Cut { tokens: 1, labels: 1 })));
        assert_eq!(fit(Truncation::Left, vec![long.clone()], 3).0, [example(&[5], &[false], &[6, 7])]);
        assert_eq!(fit(Truncation::Left, vec![long.clone()], 2).1, Err(DropReason::CompletionTooLong));
        assert_eq!(fit(Truncation::Left, vec![long.clone()], 0).1, Err(DropReason::CompletionTooLong));
        assert_eq!(fit(Truncation::Left, vec![long.clone()], 7), (vec![long], Ok(Cut::default())));
    }

    #[test]
    fn a_pair_keeps_one_prompt() {
        let pair = vec![example(&[2, 3, 4], &[], &[6]), example(&[2, 3, 4], &[], &[7, 8])];
        let (group, cut) = fit(Truncation::Left, pair.clone(), 4);
        assert_eq!(group, [example(&[3, 4], &[], &[6]), example(&[3, 4], &[], &[7, 8])]);
        assert_eq!(cut, Ok(Cut { tokens: 2, labels: 0 }));
        let (group, cut) = fit(Truncation::Right, pair.clone(), 4);
        assert_eq!(group, [example(&[2, 3, 4], &[], &[6]), example(&[2, 3, 4], &[], &[7])]);
        assert_eq!(cut, Ok(Cut { tokens: 1, labels: 1 }));
        assert_eq!(fit(Truncation::Right, pair.clone(), 3).1, Err(DropReason::PromptTooLong));
        assert_eq!(fit(Truncation::Drop, pair.clone(), 4).1, Err(DropReason::TooLong));
        assert_eq!(fit(Truncation::Drop, pair, 5).1, Ok(Cut::default()));
    }
}
