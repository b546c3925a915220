//! Rotary embeddings as configurations describe them: `rope_scaling` beside `rope_theta`, or `rope_parameters` where
//! transformers 5 keeps all.

use serde_json::json;

use super::super::rotary::{Scaling, Yarn};
use super::super::{Result, Rotary};
use super::Config;
use super::fields::{RopeFields, Rule};

const LAYER_TYPES: [&str; 2] = ["full_attention", "sliding_attention"];

impl Config<'_> {
    /// The rotary embedding of all layers.
    pub(super) fn rotary(&self, fields: &RopeFields, head_dim: usize, max_positions: usize) -> Result<Rotary> {
        let rope = self.rope_section()?;
        if let Some(nested) = LAYER_TYPES.iter().find(|kind| rope.get(kind).is_some()) {
            return rope.fail(nested, "is given", "this family has one rotary embedding for all layers");
        }
        self.rotary_of(&rope, fields, head_dim, max_positions)
    }

    /// The rotary embedding of the layers of one kind, which `rope_parameters` may hold by itself. In the old form, the
    /// scaling rule is that of `full_attention`.
    pub(super) fn rotary_of_kind(
        &self,
        kind: &str,
        names: &RopeFields,
        head_dim: usize,
        max_positions: usize,
    ) -> Result<Rotary> {
        let rope = self.section("rope_parameters", json!({}))?;
        let mut fields = rope.fields().into_iter().flat_map(|fields| fields.keys());
        if let Some(field) = fields.find(|field| !LAYER_TYPES.contains(&field.as_str())) {
            return rope.fail(
                field,
                "is given for all layers",
                "this family has one rotary embedding for each layer type",
            );
        }
        let own = rope.section(kind, json!({}))?;
        let old = self.section("rope_scaling", json!({}))?;
        let rope = if kind == "full_attention" && old.is_given() { &old } else { &own };
        self.rotary_of(rope, names, head_dim, max_positions)
    }

    /// transformers takes `rope_scaling` where both are there.
    fn rope_section(&self) -> Result<Config<'_>> {
        let old = self.section("rope_scaling", json!({}))?;
        if old.is_given() { Ok(old) } else { self.section("rope_parameters", json!({})) }
    }

    fn rotary_of(&self, rope: &Config, fields: &RopeFields, head_dim: usize, max_positions: usize) -> Result<Rotary> {
        let theta = match rope.optional_positive("rope_theta")? {
            Some(theta) => theta,
            None => self.positive(fields.theta)?,
        };
        let dim = self.rotary_dim(rope, fields, head_dim)?;
        let rule = self.rule(rope, fields)?;
        let original = || -> Result<usize> {
            let own = self.optional_size("original_max_position_embeddings")?;
            let own = own.map_or_else(|| rope.optional_size("original_max_position_embeddings"), |n| Ok(Some(n)));
            own.map(|own| own.unwrap_or(max_positions))
        };
        let stretch = |original: usize| -> Result<f64> {
            let given = rope.optional_positive("factor")?;
            Ok(given.unwrap_or(max_positions as f64 / original as f64))
        };
        let scaling = match rule {
            Rule::Default => Scaling::Default,
            Rule::Linear => Scaling::Linear { factor: rope.positive("factor")? },
            Rule::Dynamic if dim == 2 => {
                return rope.fail("rope_type", "is `dynamic` for a single pair", "such a base is infinite");
            }
            Rule::Dynamic => Scaling::Dynamic { factor: rope.positive("factor")?, original: max_positions },
            Rule::Llama3 => Scaling::Llama3 {
                factor: rope.positive("factor")?,
                low_freq_factor: rope.positive("low_freq_factor")?,
                high_freq_factor: rope.positive("high_freq_factor")?,
                original_max_positions: original()? as f64,
            },
            Rule::Yarn => {
                let original = original()?;
                Scaling::Yarn(Yarn {
                    factor: stretch(original)?,
                    original: original as f64,
                    beta_fast: rope.optional_number("beta_fast")?.filter(|beta| *beta != 0.0).unwrap_or(32.0),
                    beta_slow: rope.optional_number("beta_slow")?.filter(|beta| *beta != 0.0).unwrap_or(1.0),
                    truncate: rope.get("truncate").is_none() || rope.bool("truncate")?,
                    attention_factor: rope.optional_positive("attention_factor")?,
                    mscale: rope.optional_number("mscale")?.unwrap_or(0.0),
                    mscale_all_dim: rope.optional_number("mscale_all_dim")?.unwrap_or(0.0),
                })
            }
            Rule::Longrope => {
                let original = original()?;
                Scaling::Longrope {
                    short: rope.positives("short_factor", dim / 2)?,
                    long: rope.positives("long_factor", dim / 2)?,
                    factor: stretch(original)?,
                    original,
                    attention_factor: rope.optional_positive("attention_factor")?,
                }
            }
            Rule::Factors => Scaling::Factors(rope.positives("factors", dim / 2)?),
        };
        let rotary = Rotary::new(dim, theta, &scaling);
        let beyond = rotary.frequencies(usize::MAX);
        let finite = |frequencies: &[f32]| frequencies.iter().all(|frequency| frequency.is_finite());
        if finite(&rotary.inv_freq) && finite(&beyond) && rotary.attention_factor.is_finite() {
            return Ok(rotary);
        }
        rope.fail(
            "rope_type",
            "and the numbers beside it give frequencies that are not finite",
            "correct these numbers",
        )
    }

    fn rule(&self, rope: &Config, fields: &RopeFields) -> Result<Rule> {
        let field = if rope.get("rope_type").is_none() && rope.get("type").is_some() { "type" } else { "rope_type" };
        let name = if rope.get(field).is_some() { rope.string(field)? } else { "default" };
        match fields.rules.iter().find(|(known, _)| *known == name) {
            Some((_, rule)) => Ok(*rule),
            None => {
                let known: Vec<&str> =
                    fields.rules.iter().map(|(name, _)| *name).filter(|name| *name != "factors").collect();
                let why = format!("is `{name}`, a scaling rule that prefold does not compute for this family");
                rope.fail(field, why, format!("known: {}", known.join(", ")))
            }
        }
    }

    /// How many elements of a head are turned.
    fn rotary_dim(&self, rope: &Config, fields: &RopeFields, head_dim: usize) -> Result<usize> {
        const PARTIAL: &str = "partial_rotary_factor";
        let own = fields.partial.unwrap_or(PARTIAL);
        let (config, field) = if rope.get(PARTIAL).is_some() { (rope, PARTIAL) } else { (self, own) };
        let part = config.optional_number(field)?.unwrap_or(1.0);
        if !(part > 0.0 && part <= 1.0) {
            return config.fail(field, format!("is {part}"), "it is a part of a head: above 0, at most 1");
        }
        if fields.partial.is_none() && part != 1.0 {
            return config.fail(field, format!("is {part}"), "models of this family turn whole heads");
        }
        let dim = (head_dim as f64 * part) as usize;
        if dim >= 2 && dim.is_multiple_of(2) {
            return Ok(dim);
        }
        if part == 1.0 {
            return self.fail("head_dim", format!("is {dim}, an odd number"), "rotary positions turn pairs");
        }
        config.fail(field, format!("turns {dim} of {head_dim} elements"), "rotary positions turn pairs")
    }

    fn is_given(&self) -> bool {
        self.fields().is_some_and(|fields| !fields.is_empty())
    }
}
