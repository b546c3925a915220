//! `gemma3`: the text part of the Gemma 3 models that see images.

use serde_json::{Value, json};

use super::super::{DecoderSpec, Result};
use super::{Config, gemma3_text};

pub(super) fn defaults() -> Value {
    json!({"text_config": {}, "tie_word_embeddings": true})
}

pub(super) fn spec(config: &Config) -> Result<DecoderSpec> {
    let mut defaults = gemma3_text::defaults();
    defaults["model_type"] = json!("gemma3_text");
    let text = config.section("text_config", defaults)?;
    let mut spec = gemma3_text::spec(&text)?;
    spec.family = config.string("model_type")?.into();
    spec.head.tied = config.bool("tie_word_embeddings")?;
    spec.names = spec
        .names
        .moved("model.", "model.language_model.")
        .or_under("model.language_model.", "model.")
        .or_under("model.language_model.", "language_model.model.")
        .or_under("lm_head.", "language_model.lm_head.")
        .beside(&["vision_tower", "multi_modal_projector"]);
    Ok(spec)
}
