//! Mutants of the graph around an adapter.

use prefold::onnx::{Model, TensorDef};

use super::graph::{attribute, behind, insert, map, node, op, read, rounded, swap_maps, weight};
use super::{Dialect, Kind, Mutant, at, outside};

pub fn indices(name: &str, values: &[i64]) -> TensorDef {
    TensorDef::from_i64s(name, &[values.len() as i64], values)
}

fn positions(model: &Model, _: Dialect) -> Model {
    let one = TensorDef::from_i64s("mutant/one", &[], &[1]);
    behind(
        model,
        "position_ids",
        vec![one],
        vec![op("Add", "mutant/next", &["position_ids", "mutant/one"])],
        "mutant/next",
    )
}

fn theta(model: &Model, _: Dialect) -> Model {
    weight(model, "/model/rotary_emb.0/inv_freq", |_, values| values.iter().map(|x| x.powf(1.25)).collect())
}

fn causal(model: &Model, _: Dialect) -> Model {
    read(model, "/model/mask/Where", 0, "/model/mask/Unsqueeze_real/output_0")
}

fn padding(model: &Model, _: Dialect) -> Model {
    let real = "/model/mask/Unsqueeze_real/output_0";
    let nodes = vec![op("Not", "mutant/padding", &[real]), op("Or", "mutant/all", &[real, "mutant/padding"])];
    behind(model, real, vec![], nodes, "mutant/all")
}

fn window(model: &Model, dialect: Dialect) -> Model {
    match dialect {
        Dialect::Portable => read(model, "/model/mask/window_6/Where", 0, "/model/mask/And/output_0"),
        Dialect::Ort => attribute(model, "local_window_size", 0, 0x18, &[100]),
    }
}

/// One more key than the window holds.
fn wide_window(model: &Model, dialect: Dialect) -> Model {
    match dialect {
        Dialect::Portable => {
            let seven = TensorDef::from_i64s("mutant/seven", &[], &[7]);
            insert(model, "/model/mask/window_6/Sub", 1, vec![seven], vec![], "mutant/seven")
        }
        Dialect::Ort => attribute(model, "local_window_size", 0, 0x18, &[7]),
    }
}

fn soft_cap(model: &Model, dialect: Dialect) -> Model {
    match dialect {
        Dialect::Portable => {
            read(model, "/model/layers.0/self_attn/Add_bias", 0, "/model/layers.0/self_attn/Mul_scale/output_0")
        }
        Dialect::Ort => attribute(model, "softcap", 0, 0x15, &0f32.to_le_bytes()),
    }
}

fn scale(model: &Model, dialect: Dialect) -> Model {
    match dialect {
        Dialect::Portable => {
            let other = TensorDef::from_f32s("mutant/scale", &[], &[0.25]);
            insert(model, "/model/layers.1/self_attn/Mul_scale", 1, vec![other], vec![], "mutant/scale")
        }
        Dialect::Ort => attribute(model, "scale", 1, 0x15, &0.25f32.to_le_bytes()),
    }
}

/// The values' two heads are exchanged.
fn groups(model: &Model, dialect: Dialect) -> Model {
    let gather = |tensor, axis| op("Gather", "mutant/turned", &[tensor, "mutant/order"]).attr_int("axis", axis);
    match dialect {
        Dialect::Portable => {
            let order = vec![indices("mutant/order", &[1, 0])];
            let nodes = vec![gather("present.0.value", 1)];
            insert(model, "/model/layers.0/self_attn/Unsqueeze_value", 0, order, nodes, "mutant/turned")
        }
        Dialect::Ort => {
            let order: Vec<i64> = (8..16).chain(0..8).collect();
            let name = "/model/layers.0/self_attn/GroupQueryAttention";
            let nodes = vec![gather(node(model, name).input(2).unwrap(), 2)];
            insert(model, name, 2, vec![indices("mutant/order", &order)], nodes, "mutant/turned")
        }
    }
}

/// Query heads meet the keys of another group.
fn head_order(model: &Model, dialect: Dialect) -> Model {
    let gather = |tensor, axis| op("Gather", "mutant/turned", &[tensor, "mutant/order"]).attr_int("axis", axis);
    match dialect {
        Dialect::Portable => {
            let name = "/model/layers.0/self_attn/Reshape_group";
            let nodes = vec![gather(node(model, name).input(0).unwrap(), 1)];
            insert(model, name, 0, vec![indices("mutant/order", &[0, 2, 1, 3])], nodes, "mutant/turned")
        }
        Dialect::Ort => {
            let order: Vec<i64> = [0, 2, 1, 3].iter().flat_map(|head| head * 8..head * 8 + 8).collect();
            let name = "/model/layers.0/self_attn/GroupQueryAttention";
            let nodes = vec![gather(node(model, name).input(0).unwrap(), 2)];
            insert(model, name, 0, vec![indices("mutant/order", &order)], nodes, "mutant/turned")
        }
    }
}

/// What holds the cache of a layer, and the slot of a part.
fn cache_reader(dialect: Dialect, layer: usize, part: &str) -> (String, usize) {
    match dialect {
        Dialect::Portable => (format!("/model/layers.{layer}/self_attn/Concat_{part}"), 0),
        Dialect::Ort => {
            (format!("/model/layers.{layer}/self_attn/GroupQueryAttention"), if part == "key" { 3 } else { 4 })
        }
    }
}

/// The oldest row is gone, and the newest stands twice.
fn stale_row(model: &Model, dialect: Dialect) -> Model {
    let (name, slot) = cache_reader(dialect, 1, "key");
    let past = "past_key_values.1.key";
    let constants = vec![
        indices("mutant/first", &[1]),
        indices("mutant/last", &[-1]),
        indices("mutant/end", &[i64::MAX]),
        indices("mutant/axis", &[2]),
    ];
    let slice = |name, start| op("Slice", name, &[past, start, "mutant/end", "mutant/axis"]);
    let nodes = vec![
        slice("mutant/rest", "mutant/first"),
        slice("mutant/again", "mutant/last"),
        op("Concat", "mutant/stale", &["mutant/rest", "mutant/again"]).attr_int("axis", 2),
    ];
    insert(model, &name, slot, constants, nodes, "mutant/stale")
}

fn other_cache(model: &Model, dialect: Dialect) -> Model {
    let (name, slot) = cache_reader(dialect, 1, "value");
    read(model, &name, slot, "past_key_values.0.value")
}

fn tf32(model: &Model, _: Dialect) -> Model {
    map(model, 1, "mlp.up_proj", |_, values| rounded(values, 10))
}

fn swapped_queries(model: &Model, _: Dialect) -> Model {
    swap_maps(model, (0, "self_attn.q_proj"), (1, "self_attn.q_proj"))
}

fn gate_and_up(model: &Model, _: Dialect) -> Model {
    swap_maps(model, (0, "mlp.gate_proj"), (0, "mlp.up_proj"))
}

fn activation(model: &Model, dialect: Dialect) -> Model {
    let gate = match dialect {
        Dialect::Portable => "/model/layers.1/mlp/gate_proj/Add/output_0",
        Dialect::Ort => "/model/layers.1/mlp/gate_proj/output_0",
    };
    read(model, "/model/layers.1/mlp/Mul", 0, gate)
}

fn epsilon(model: &Model, dialect: Dialect) -> Model {
    match dialect {
        Dialect::Portable => {
            let other = TensorDef::from_f32s("mutant/epsilon", &[], &[1e-3]);
            insert(model, "/model/layers.1/input_layernorm/Add", 1, vec![other], vec![], "mutant/epsilon")
        }
        // the attribute of layer 0's norm before its MLP comes first
        Dialect::Ort => attribute(model, "epsilon", 1, 0x15, &1e-3f32.to_le_bytes()),
    }
}

fn residual(model: &Model, dialect: Dialect) -> Model {
    let name = match dialect {
        Dialect::Portable => "/model/layers.1/post_attention_layernorm/Add_residual",
        Dialect::Ort => "/model/layers.1/post_attention_layernorm/SkipSimplifiedLayerNormalization",
    };
    read(model, name, 0, "/model/embed_tokens/Gather/output_0")
}

fn output_bias(model: &Model, _: Dialect) -> Model {
    weight(model, "model.layers.1.self_attn.o_proj.bias", |_, values| vec![0.0; values.len()])
}

fn embedding(model: &Model, _: Dialect) -> Model {
    weight(model, "model.embed_tokens.weight", |_, values| rounded(values, 7))
}

fn final_norm(model: &Model, _: Dialect) -> Model {
    weight(model, "model.norm.weight", |_, values| values.iter().map(|x| 1.0 + x).collect())
}

fn head(model: &Model, _: Dialect) -> Model {
    let head = model.graph().initializers().iter().map(|tensor| tensor.name()).find(|name| name.starts_with("lm_head"));
    weight(model, head.unwrap(), |_, values| rounded(values, 10))
}

pub fn all() -> Vec<Mutant> {
    let folded = |what, change, place| Mutant::new(what, Kind::Folded, change, place);
    let gemma2 = |what, change, place| Mutant::new(what, Kind::Gemma2, change, place);
    vec![
        folded("positions are off by one", positions, at(0, "query")),
        folded("the rotation has another base", theta, at(0, "query")),
        folded("the causal mask is dropped", causal, at(0, "attention_weights")).only(Dialect::Portable),
        folded("the padding mask is dropped", padding, at(0, "attention_weights")).in_ort(at(0, "attention")),
        gemma2("the sliding window is dropped", window, at(0, "attention_weights")).in_ort(at(0, "attention")),
        gemma2("the sliding window is one key too wide", wide_window, at(0, "attention_weights"))
            .in_ort(at(0, "attention")),
        gemma2("the soft cap of the scores is dropped", soft_cap, at(0, "attention_scores")).in_ort(at(0, "attention")),
        folded("the scores have another scale", scale, at(1, "attention_scores")).in_ort(at(1, "attention")),
        folded("the groups of key-value heads are exchanged", groups, at(0, "attention")).in_ort(at(0, "values")),
        folded("query heads are in another order", head_order, at(0, "query")),
        folded("a row of the cached keys is stale", stale_row, at(1, "keys")),
        folded("a layer reads another's cached values", other_cache, at(1, "values")),
        folded("a weight is rounded as TF32 does", tf32, at(1, "up_projection")),
        folded("q_proj of two layers exchanged", swapped_queries, at(0, "query_projection")),
        folded("gate_proj and up_proj exchanged", gate_and_up, at(0, "gate_projection")),
        folded("the activation of the MLP is left out", activation, at(1, "mlp_inner")),
        folded("a norm has another epsilon", epsilon, at(1, "attention_input")),
        folded("the residual stream skips a layer", residual, at(1, "attention_residual")),
        folded("the bias of o_proj is left out", output_bias, at(1, "output_projection")),
        folded("the embedding is rounded to bf16", embedding, outside("embedding")),
        folded("the final norm adds one to its weight", final_norm, outside("final_norm")),
        folded("the head is rounded as TF32 does", head, outside("logits")),
    ]
}
