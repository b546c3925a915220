//! Decoder families: each file maps its `config.json` to a [`DecoderSpec`] and does nothing else.
//!
//! `llama::like` is the mapping of what most families share; a family's file shows what it does otherwise.

mod cohere;
mod config;
mod fields;
mod gemma2;
mod gemma3;
mod gemma3_text;
mod gpt2;
mod gpt_neox;
mod granite;
mod layers;
mod llama;
mod mistral;
mod olmo2;
mod opt;
mod phi;
mod phi3;
mod qwen2;
mod qwen3;
mod rope;
mod smollm3;
mod stablelm;

use std::path::Path;

use serde_json::{Value, json};

use super::{DecoderSpec, Error, Result};
use config::Config;
pub(super) use fields::Fields;
use fields::RopeFields;

/// A decoder family.
struct Family {
    model_type: &'static str,
    /// What its configuration calls the fields that all have.
    fields: Fields,
    /// What its configuration class in transformers takes where `config.json` is silent.
    defaults: fn() -> Value,
    spec: fn(&Config) -> Result<DecoderSpec>,
}

const FAMILIES: &[Family] = &[
    Family { model_type: "llama", fields: Fields::LLAMA, defaults: llama::defaults, spec: llama::spec },
    Family { model_type: "mistral", fields: Fields::LLAMA, defaults: mistral::defaults, spec: mistral::spec },
    Family { model_type: "qwen2", fields: Fields::LLAMA, defaults: qwen2::defaults, spec: qwen2::spec },
    Family { model_type: "qwen3", fields: Fields::LLAMA, defaults: qwen3::defaults, spec: qwen3::spec },
    Family { model_type: "gpt2", fields: gpt2::FIELDS, defaults: gpt2::defaults, spec: gpt2::spec },
    Family { model_type: "gpt_neox", fields: gpt_neox::FIELDS, defaults: gpt_neox::defaults, spec: gpt_neox::spec },
    Family { model_type: "phi", fields: Fields::LAYER_NORM, defaults: phi::defaults, spec: phi::spec },
    Family { model_type: "phi3", fields: phi3::FIELDS, defaults: phi3::defaults, spec: phi3::spec },
    Family { model_type: "gemma2", fields: gemma2::FIELDS, defaults: gemma2::defaults, spec: gemma2::spec },
    Family { model_type: "gemma3", fields: gemma2::FIELDS, defaults: gemma3::defaults, spec: gemma3::spec },
    Family {
        model_type: "gemma3_text",
        fields: gemma2::FIELDS,
        defaults: gemma3_text::defaults,
        spec: gemma3_text::spec,
    },
    Family { model_type: "smollm3", fields: Fields::LLAMA, defaults: smollm3::defaults, spec: smollm3::spec },
    Family { model_type: "granite", fields: Fields::LLAMA, defaults: granite::defaults, spec: granite::spec },
    Family { model_type: "olmo2", fields: Fields::LLAMA, defaults: olmo2::defaults, spec: olmo2::spec },
    Family { model_type: "stablelm", fields: Fields::LAYER_NORM, defaults: stablelm::defaults, spec: stablelm::spec },
    Family { model_type: "opt", fields: opt::FIELDS, defaults: opt::defaults, spec: opt::spec },
    Family { model_type: "cohere", fields: cohere::FIELDS, defaults: cohere::defaults, spec: cohere::spec },
];

/// The `model_type`s that prefold knows.
pub fn known() -> impl Iterator<Item = &'static str> {
    FAMILIES.iter().map(|family| family.model_type)
}

/// What a family calls the fields that all have.
pub(super) fn fields(model_type: &str) -> &'static Fields {
    FAMILIES.iter().find(|family| family.model_type == model_type).map_or(&Fields::LLAMA, |family| &family.fields)
}

/// Maps a `config.json` to a [`DecoderSpec`]; `path` names the file in errors.
///
/// # Errors
/// When the family is unknown, or a field is missing, of another type, or asks for what prefold does not compute.
pub fn spec_from_config(path: &Path, config: &Value) -> Result<DecoderSpec> {
    let bare = Config::new(path, config, json!({}));
    let model_type = bare.string("model_type")?;
    match FAMILIES.iter().find(|family| family.model_type == model_type) {
        Some(family) => (family.spec)(&Config::new(path, config, (family.defaults)())),
        None => Err(Error::Family {
            path: path.into(),
            family: model_type.into(),
            known: known().collect::<Vec<_>>().join(", "),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn llama() -> Value {
        json!({"model_type": "llama", "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128,
               "num_hidden_layers": 2, "num_attention_heads": 4, "rms_norm_eps": 1e-5, "hidden_act": "silu"})
    }

    fn message(config: &Value) -> String {
        spec_from_config(Path::new("config.json"), config).unwrap_err().to_string()
    }

    #[test]
    fn errors_name_file_field_and_reason() {
        let with = |key: &str, value: Value| {
            let mut config = llama();
            config[key] = value;
            message(&config)
        };
        insta::assert_snapshot!([
            with("model_type", json!("mamba")),
            with("hidden_size", Value::Null),
            with("hidden_size", json!("wide")),
            with("num_attention_heads", json!(3)),
            with("num_key_value_heads", json!(3)),
            with("head_dim", json!(7)),
            with("hidden_act", json!("xielu")),
            with("rope_scaling", json!({"rope_type": "mrope"})),
            with("rope_scaling", json!({"rope_type": "linear"})),
            with("rope_scaling", json!({"rope_type": "linear", "factor": 0})),
            message(&json!({})),
        ].join("\n"), @r#"
        config.json: model_type `mamba` is not a family that prefold knows
        config.json: `hidden_size` is missing
        config.json: `hidden_size` should be a positive integer, but is "wide"
        config.json: `num_attention_heads` is 3, which does not divide hidden_size (64)
        config.json: `num_key_value_heads` is 3, which does not divide num_attention_heads (4)
        config.json: `head_dim` is 7, an odd number
        config.json: `hidden_act` is `xielu`, an activation that prefold does not compute
        config.json: `rope_scaling.rope_type` is `mrope`, a scaling rule that prefold does not compute for this family
        config.json: `rope_scaling.factor` is missing
        config.json: `rope_scaling.factor` is 0
        config.json: `model_type` is missing
        "#);
    }

    #[test]
    fn rope_parameters_hold_theta_in_transformers_5() {
        let mut old = llama();
        old["rope_theta"] = json!(5e5);
        old["rope_scaling"] = json!({"type": "linear", "factor": 2.0});
        let mut new = llama();
        new["rope_parameters"] = json!({"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5});
        let path = Path::new("config.json");
        let (old, new) = (spec_from_config(path, &old).unwrap(), spec_from_config(path, &new).unwrap());
        assert_eq!(old, new);
        assert_eq!(old.attention.rotary[0].inv_freq[0], 0.5);
    }

    /// Each pair says the same as transformers 4 and 5 write it.
    #[test]
    fn both_forms_of_rope_give_one_spec() {
        let long = |kind: &str| json!({"type": kind, "short_factor": vec![1.0; 48], "long_factor": vec![2.0; 48]});
        let new_long = json!({"rope_type": "longrope", "rope_theta": 1e4, "short_factor": vec![1.0; 48], "long_factor": vec![2.0; 48]});
        let pairs = [
            (
                "qwen2",
                json!({"rope_theta": 1e6, "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192}}),
                json!({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 8192}}),
            ),
            (
                "gpt_neox",
                json!({"rotary_pct": 0.5, "rotary_emb_base": 5e3, "rope_theta": 1.0}),
                json!({"rope_parameters": {"rope_theta": 5e3, "partial_rotary_factor": 0.5}}),
            ),
            (
                "gemma3_text",
                json!({"rope_theta": 5e5, "rope_local_base_freq": 5e3, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}),
                json!({"rope_parameters": {
                    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e5},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 5e3},
                }}),
            ),
            (
                "phi3",
                json!({"max_position_embeddings": 131_072, "rope_scaling": long("su")}),
                json!({"max_position_embeddings": 131_072, "rope_parameters": new_long}),
            ),
            (
                "stablelm",
                json!({"partial_rotary_factor": 0.5, "rope_theta": 5e3}),
                json!({"rope_parameters": {"partial_rotary_factor": 0.5, "rope_theta": 5e3}}),
            ),
        ];
        for (family, old, new) in pairs {
            let (old, new) = (with(family, old).unwrap(), with(family, new).unwrap());
            assert_eq!(old, new);
            assert_ne!(old.attention.rotary, with(family, json!({})).unwrap().attention.rotary);
        }
    }

    /// A configuration that says only what family it is of has the class's sizes.
    fn with(family: &str, fields: Value) -> Result<DecoderSpec> {
        let mut config = json!({"model_type": family});
        config.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        spec_from_config(Path::new("c"), &config)
    }

    #[test]
    fn every_family_stands_on_its_class_s_defaults() {
        let described: Vec<String> = known()
            .map(|family| {
                let spec = with(family, json!({})).unwrap();
                let a = &spec.attention;
                let windows = spec.layers.iter().filter(|layer| layer.window.is_some()).count();
                let turned = spec.layers.iter().filter(|layer| layer.rotary.is_some()).count();
                format!(
                    "{family}: {:.2}B, {} layers ({windows} windows, {turned} turned), {} / {} heads of {}, {} turned, tied {}",
                    spec.num_parameters() as f64 / 1e9,
                    spec.num_layers,
                    a.num_heads,
                    a.num_kv_heads,
                    a.head_dim,
                    a.rotary.first().map_or(0, |rotary| rotary.dim),
                    spec.head.tied,
                )
            })
            .collect();
        insta::assert_snapshot!(described.join("\n"), @"
        llama: 6.74B, 32 layers (0 windows, 32 turned), 32 / 32 heads of 128, 128 turned, tied false
        mistral: 7.24B, 32 layers (32 windows, 32 turned), 32 / 8 heads of 128, 128 turned, tied false
        qwen2: 12.05B, 32 layers (0 windows, 32 turned), 32 / 32 heads of 128, 128 turned, tied false
        qwen3: 12.05B, 32 layers (0 windows, 32 turned), 32 / 32 heads of 128, 128 turned, tied false
        gpt2: 0.12B, 12 layers (0 windows, 0 turned), 12 / 12 heads of 64, 0 turned, tied true
        gpt_neox: 20.55B, 44 layers (0 windows, 44 turned), 64 / 64 heads of 96, 24 turned, tied false
        phi: 1.42B, 24 layers (0 windows, 24 turned), 32 / 32 heads of 64, 32 turned, tied false
        phi3: 3.82B, 32 layers (0 windows, 32 turned), 32 / 32 heads of 96, 96 turned, tied false
        gemma2: 2.61B, 26 layers (13 windows, 26 turned), 8 / 4 heads of 256, 256 turned, tied true
        gemma3: 2.63B, 26 layers (22 windows, 26 turned), 8 / 4 heads of 256, 256 turned, tied true
        gemma3_text: 2.63B, 26 layers (22 windows, 26 turned), 8 / 4 heads of 256, 256 turned, tied true
        smollm3: 3.08B, 36 layers (0 windows, 27 turned), 16 / 4 heads of 128, 128 turned, tied true
        granite: 6.74B, 32 layers (0 windows, 32 turned), 32 / 32 heads of 128, 128 turned, tied false
        olmo2: 6.89B, 32 layers (0 windows, 32 turned), 32 / 32 heads of 128, 128 turned, tied false
        stablelm: 2.80B, 32 layers (0 windows, 32 turned), 32 / 32 heads of 80, 20 turned, tied false
        opt: 0.13B, 12 layers (0 windows, 0 turned), 12 / 12 heads of 64, 0 turned, tied true
        cohere: 34.98B, 40 layers (0 windows, 40 turned), 64 / 64 heads of 128, 128 turned, tied true
        ");
    }

    #[test]
    fn what_a_spec_cannot_say_is_refused_by_field() {
        let refused = [
            ("llama", json!({"rope_scaling": "linear"})),
            ("llama", json!({"rope_scaling": {"rope_type": "dynamic"}})),
            ("llama", json!({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}})),
            ("llama", json!({"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}})),
            ("llama", json!({"rope_theta": 1.0, "rope_scaling": {"rope_type": "yarn", "factor": 2.0}})),
            ("llama", json!({"rope_theta": 1e-60})),
            ("llama", json!({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}})),
            ("llama", json!({"partial_rotary_factor": 0.5})),
            ("mistral", json!({"layer_types": vec!["full_attention"; 32]})),
            ("mistral", json!({"sliding_window": -1})),
            ("qwen2", json!({"layer_types": vec!["sliding_attention"; 32]})),
            ("qwen2", json!({"layer_types": ["full_attention"]})),
            ("qwen3", json!({"layer_types": vec!["linear_attention"; 32]})),
            ("gpt2", json!({"scale_attn_by_inverse_layer_idx": true})),
            ("gpt2", json!({"add_cross_attention": true})),
            ("gpt2", json!({"n_head": 7})),
            ("gpt_neox", json!({"rotary_pct": 0.0})),
            ("gpt_neox", json!({"rotary_pct": 0.04})),
            ("phi", json!({"partial_rotary_factor": 1.5})),
            ("phi3", json!({"rope_scaling": {"type": "linear", "factor": 2.0}})),
            ("phi3", json!({"rope_scaling": {"type": "su", "short_factor": [1.0], "long_factor": [1.0]}})),
            ("gemma2", json!({"use_bidirectional_attention": true})),
            ("gemma2", json!({"attn_logit_softcapping": 0})),
            ("gemma2", json!({"sliding_window": null})),
            ("gemma3_text", json!({"attn_logit_softcapping": 50.0})),
            ("gemma3_text", json!({"rope_parameters": {"rope_type": "linear"}})),
            ("gemma3", json!({"text_config": {"hidden_size": "wide"}})),
            ("smollm3", json!({"no_rope_layers": [1, 1]})),
            ("smollm3", json!({"num_hidden_layers": 2, "no_rope_layers": ["yes", "no"]})),
            ("granite", json!({"logits_scaling": 0})),
            ("olmo2", json!({"attention_bias": 1})),
            ("stablelm", json!({"num_key_value_heads": 5})),
            ("opt", json!({"layer_norm_elementwise_affine": false})),
            ("cohere", json!({"logit_scale": null})),
        ];
        let messages = refused.map(|(family, fields)| format!("{family} {}", with(family, fields).unwrap_err()));
        insta::assert_snapshot!(messages.join("\n"), @r#"
        llama c: `rope_scaling` should be an object, but is "linear"
        llama c: `rope_scaling.factor` is missing
        llama c: `rope_scaling.short_factor` is missing
        llama c: `rope_scaling.short_factor` has 1 entries for 64 frequencies
        llama c: `rope_scaling.rope_type` and the numbers beside it give frequencies that are not finite
        llama c: `rope_parameters.rope_type` and the numbers beside it give frequencies that are not finite
        llama c: `rope_parameters.full_attention` is given
        llama c: `partial_rotary_factor` is 0.5
        mistral c: `layer_types` differs from sliding_window, which is 4096
        mistral c: `sliding_window` should be a positive integer, but is -1
        qwen2 c: `sliding_window` is missing, and there are layers of sliding_attention
        qwen2 c: `layer_types` has 1 entries for 32 layers
        qwen3 c: `layer_types` holds "linear_attention", a kind of attention that prefold does not compute
        gpt2 c: `scale_attn_by_inverse_layer_idx` is true: scores are scaled by layer
        gpt2 c: `add_cross_attention` is true: layers attend to an encoder
        gpt2 c: `n_head` is 7, which does not divide n_embd (768)
        gpt_neox c: `rotary_pct` is 0
        gpt_neox c: `rotary_pct` turns 3 of 96 elements
        phi c: `partial_rotary_factor` is 1.5
        phi3 c: `rope_scaling.type` is `linear`, a scaling rule that prefold does not compute for this family
        phi3 c: `rope_scaling.short_factor` has 1 entries for 48 frequencies
        gemma2 c: `use_bidirectional_attention` is true: tokens see those that follow them
        gemma2 c: `attn_logit_softcapping` is 0
        gemma2 c: `sliding_window` is missing, and there are layers of sliding_attention
        gemma3_text c: `attn_logit_softcapping` is given
        gemma3_text c: `rope_parameters.rope_type` is given for all layers
        gemma3 c: `text_config.hidden_size` should be a positive integer, but is "wide"
        smollm3 c: `no_rope_layers` has 2 entries for 36 layers
        smollm3 c: `no_rope_layers` should be a list of zeros and ones, but is ["yes","no"]
        granite c: `logits_scaling` is 0
        olmo2 c: `attention_bias` should be true or false, but is 1
        stablelm c: `num_key_value_heads` is 5, which does not divide num_attention_heads (32)
        opt c: `layer_norm_elementwise_affine` is false: norms have no weights
        cohere c: `logit_scale` is missing
        "#);
    }

    /// The text part as `google/gemma-3-4b-it` was published: what it does not say is the class's default. 3.88 billion
    /// parameters without the 0.42 of the vision tower.
    #[test]
    fn a_sparse_published_configuration_is_completed() {
        let text = json!({
            "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024,
        });
        let spec = with("gemma3", json!({"text_config": text})).unwrap();
        assert_eq!(spec.num_parameters(), 3_880_263_168);
        let rotary = &spec.attention.rotary;
        assert_eq!((rotary[0].inv_freq[0], rotary[1].inv_freq[0]), (0.125, 1.0));
        let full: Vec<usize> = (0..34).filter(|layer| spec.layers[*layer].window.is_none()).collect();
        assert_eq!(full, [5, 11, 17, 23, 29]);
        assert!(spec.layers.iter().all(|layer| layer.rotary == Some(usize::from(layer.window == Some(1024)))));
    }
}
