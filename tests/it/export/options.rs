//! What a decoder can be: a small Llama, and one change for each thing that a `DecoderSpec` says.

use std::path::Path;

use prefold::base::{
    Activation, DecoderSpec, LearnedPositions, LongContext, Norm, NormKind, QkNorm, QkNormOver, Rotary, Wiring, family,
};

/// Where an option of a decoder departs from a small Llama.
pub type Change = fn(&mut DecoderSpec);

pub fn spec(change: Change) -> DecoderSpec {
    let config = serde_json::json!({
        "model_type": "llama", "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "rope_theta": 100.0,
        "intermediate_size": 24, "hidden_act": "silu", "tie_word_embeddings": true,
    });
    let mut spec = family::spec_from_config(Path::new("config.json"), &config).unwrap();
    change(&mut spec);
    spec
}

fn layer_norm(spec: &mut DecoderSpec) {
    spec.norm = Norm { kind: NormKind::Layer, bias: true, ..spec.norm };
}

fn qk_norm(spec: &mut DecoderSpec, over: QkNormOver, kind: NormKind) {
    spec.attention.qk_norm = Some(QkNorm { norm: Norm { kind, ..spec.norm }, over });
}

fn partial(rotary: &mut Rotary) {
    (rotary.dim, rotary.inv_freq) = (4, vec![1.0, 0.1]);
}

/// One row an option, or a family's combination of them.
pub const OPTIONS: &[(&str, Change)] = &[
    ("pre norm", |_| {}),
    ("post norm", |s| s.wiring = Wiring::PostNorm),
    ("sandwich norm", |s| s.wiring = Wiring::SandwichNorm),
    ("sum norm", |s| s.wiring = Wiring::SumNorm),
    ("sum norm, layer norm, no final norm", |s| {
        layer_norm(s);
        (s.wiring, s.final_norm) = (Wiring::SumNorm, false);
    }),
    ("parallel", |s| {
        layer_norm(s);
        s.wiring = Wiring::Parallel;
    }),
    ("parallel, shared norm", |s| {
        layer_norm(s);
        s.wiring = Wiring::ParallelSharedNorm;
    }),
    ("parallel, residual scale, no final norm", |s| {
        (s.wiring, s.residual_scale, s.final_norm) = (Wiring::Parallel, 0.7, false);
    }),
    ("layer norm without bias", |s| s.norm.kind = NormKind::Layer),
    ("root mean square with bias and weight offset", |s| (s.norm.bias, s.norm.weight_offset) = (true, 1.0)),
    ("embedding, residual and score scale", |s| {
        (s.embedding.scale, s.residual_scale, s.attention.scale) = (Some(4.0), 0.25, 0.3);
    }),
    ("learned positions with offset, biases, plain MLP", |s| {
        layer_norm(s);
        s.embedding.positions = Some(LearnedPositions { rows: 66, offset: 2 });
        s.layers.iter_mut().for_each(|layer| layer.rotary = None);
        s.attention.rotary.clear();
        (s.attention.qkv_bias, s.attention.output_bias) = (true, true);
        (s.mlp.gated, s.mlp.bias, s.mlp.activation) = (false, true, Activation::Relu);
    }),
    ("embedding projections, own head", |s| (s.embedding.width, s.head.tied) = (Some(12), false)),
    ("query-key norm of each head", |s| qk_norm(s, QkNormOver::Head, NormKind::Rms)),
    ("query-key norm of each head, other epsilon and offset", |s| {
        qk_norm(s, QkNormOver::Head, NormKind::Rms);
        s.attention.qk_norm =
            s.attention.qk_norm.map(|qk| QkNorm { norm: Norm { epsilon: 1e-2, weight_offset: 1.0, ..qk.norm }, ..qk });
    }),
    ("query-key norm with own weights", |s| {
        layer_norm(s);
        qk_norm(s, QkNormOver::HeadOwnWeight, NormKind::Layer);
    }),
    ("query-key norm with own weights, root mean square", |s| qk_norm(s, QkNormOver::HeadOwnWeight, NormKind::Rms)),
    ("query-key norm of the projection", |s| qk_norm(s, QkNormOver::Projection, NormKind::Rms)),
    ("query-key layer norm of each head", |s| {
        layer_norm(s);
        qk_norm(s, QkNormOver::Head, NormKind::Layer);
    }),
    ("partial rotation", |s| partial(&mut s.attention.rotary[0])),
    ("interleaved rotation", |s| s.attention.rotary[0].interleaved = true),
    ("partial interleaved rotation with attention factor", |s| {
        partial(&mut s.attention.rotary[0]);
        s.attention.rotary[0].interleaved = true;
        s.attention.rotary[0].attention_factor = 1.2;
    }),
    ("frequencies switched by length", |s| {
        let long = LongContext::Switched { original: 9, inv_freq: vec![0.7, 0.2, 0.05, 0.01] };
        s.attention.rotary[0].long = long;
        s.attention.rotary[0].attention_factor = 1.1;
    }),
    ("dynamic NTK frequencies, partial", |s| {
        partial(&mut s.attention.rotary[0]);
        s.attention.rotary[0].long = LongContext::Ntk { original: 9, theta: 100.0, factor: 2.0 };
    }),
    ("layers without rotation", |s| s.layers[1].rotary = None),
    ("two rotations, alternating window", |s| {
        let local = Rotary { inv_freq: vec![0.9, 0.5, 0.2, 0.1], ..s.attention.rotary[0].clone() };
        s.attention.rotary.push(local);
        (s.layers[0].rotary, s.layers[0].window) = (Some(1), Some(3));
    }),
    ("window of one key", |s| s.layers[1].window = Some(1)),
    ("two windows", |s| (s.layers[0].window, s.layers[1].window) = (Some(4), Some(2))),
    ("soft caps and windows", |s| {
        (s.attention.softcap, s.head.softcap, s.layers[0].window) = (Some(2.0), Some(3.0), Some(4));
    }),
    ("GELU, gated", |s| s.mlp.activation = Activation::Gelu),
    ("tanh GELU, plain", |s| (s.mlp.activation, s.mlp.gated) = (Activation::GeluTanh, false)),
    ("SiLU, plain, bias", |s| (s.mlp.gated, s.mlp.bias) = (false, true)),
    ("head with bias, scale and soft cap", |s| {
        (s.head.tied, s.head.bias, s.head.scale, s.head.softcap) = (false, true, 0.4, Some(5.0));
    }),
    ("one key-value head", |s| s.attention.num_kv_heads = 1),
    ("as many key-value heads as query heads", |s| s.attention.num_kv_heads = 4),
    ("a head width that GroupQueryAttention does not take", |s| {
        s.attention.head_dim = 6;
        s.attention.rotary[0].dim = 6;
        s.attention.rotary[0].inv_freq = vec![1.0, 0.3, 0.1];
        (s.attention.softcap, s.layers[1].window) = (Some(3.0), Some(3));
    }),
];

/// Several options at a time, so that everything which a graph computes in another type than its own is there.
pub const COMBINATIONS: &[(&str, Change)] = &[
    ("root mean square, query-key norm, switched frequencies, soft caps, window", |s| {
        (s.wiring, s.norm.weight_offset, s.embedding.scale) = (Wiring::SandwichNorm, 1.0, Some(4.0));
        qk_norm(s, QkNormOver::Head, NormKind::Rms);
        s.attention.rotary[0].long = LongContext::Switched { original: 9, inv_freq: vec![0.7, 0.2, 0.05, 0.01] };
        (s.attention.softcap, s.head.softcap, s.layers[0].window) = (Some(2.0), Some(3.0), Some(4));
        s.mlp.activation = Activation::GeluTanh;
    }),
    ("layer norm, parallel, partial rotation with NTK frequencies, plain MLP", |s| {
        layer_norm(s);
        s.wiring = Wiring::ParallelSharedNorm;
        partial(&mut s.attention.rotary[0]);
        s.attention.rotary[0].long = LongContext::Ntk { original: 9, theta: 100.0, factor: 2.0 };
        (s.attention.qkv_bias, s.attention.output_bias) = (true, true);
        (s.mlp.gated, s.mlp.bias, s.mlp.activation) = (false, true, Activation::Gelu);
        (s.head.tied, s.head.bias, s.head.scale) = (false, true, 0.4);
    }),
    ("learned positions, sum norm, a head width that GroupQueryAttention does not take", |s| {
        layer_norm(s);
        qk_norm(s, QkNormOver::HeadOwnWeight, NormKind::Layer);
        (s.wiring, s.attention.head_dim, s.embedding.width) = (Wiring::SumNorm, 6, Some(12));
        s.embedding.positions = Some(LearnedPositions { rows: 66, offset: 2 });
        s.layers.iter_mut().for_each(|layer| (layer.rotary, layer.window) = (None, Some(5)));
        s.attention.rotary.clear();
    }),
];
