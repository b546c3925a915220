//! What a model learns of one record.

/// A prompt and what is learnt to follow it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Example {
    /// What is given; at least one token.
    pub prompt_ids: Vec<u32>,
    /// Which tokens of the prompt are learnt too, such as earlier answers in a conversation: as many as `prompt_ids`, or
    /// none where all are only given. The first is never learnt, because nothing predicts it.
    pub prompt_mask: Vec<bool>,
    /// What is learnt; ends with the token that ends the turn or the text.
    pub completion_ids: Vec<u32>,
    /// The class as the file spells it, for a classification record.
    pub label: Option<String>,
}

impl Example {
    /// Tokens in all.
    #[allow(clippy::len_without_is_empty)] // never empty
    pub fn len(&self) -> usize {
        self.prompt_ids.len() + self.completion_ids.len()
    }

    /// Every token, and whether it is learnt.
    pub fn tokens(&self) -> impl Iterator<Item = (u32, bool)> {
        let mask = self.prompt_mask.iter().copied().chain(std::iter::repeat(false));
        self.prompt_ids.iter().copied().zip(mask).chain(self.completion_ids.iter().map(|&id| (id, true)))
    }

    /// Tokens that are learnt.
    pub fn labelled(&self) -> usize {
        self.completion_ids.len() + self.prompt_mask.iter().filter(|&&learnt| learnt).count()
    }
}
