//! base
mod chat;
mod error;
mod gguf;
mod tokenizer;

pub use chat::{ChatTemplate, Message};
pub use error::{Error, Result};
pub use gguf::Gguf;
pub use tokenizer::{StreamDecoder, Tokenizer};

#[cfg(test)]
pub(crate) mod testing;
