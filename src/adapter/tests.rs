//! What all methods have in common: the start, gradients, and the formula.

use candle_core::{DType, Device, Tensor, Var};
use serde_json::{Value, json};

use super::term::TermHook;
use super::*;
use crate::base::{Input, KvCache, Linear, LinearMap, NoHook, Site, WeightShape, family};

fn spec() -> DecoderSpec {
    let config = json!({
        "model_type": "llama", "vocab_size": 24, "hidden_size": 12, "num_hidden_layers": 2, "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6, "rope_theta": 100.0,
        "intermediate_size": 16, "hidden_act": "silu", "tie_word_embeddings": true, "attention_bias": true,
    });
    family::spec_from_config(std::path::Path::new("config.json"), &config).unwrap()
}

/// Numbers between −1 and 1 that follow from the name.
fn noise(name: &str, shape: &[usize]) -> Tensor {
    let start = Start::Uniform(1.0);
    TensorSpec::new(shape, start).tensor(name, 3).unwrap().to_dtype(DType::F64).unwrap()
}

fn decoder() -> Decoder {
    Decoder::from_weights(&spec(), |weight: &WeightShape| {
        let scale = if weight.shape.len() == 1 { 1.0 } else { 0.6 };
        Ok((noise(&weight.name, &weight.shape) * scale).unwrap())
    })
    .unwrap()
}

fn config(fields: Value) -> AdapterConfig {
    let mut json = serde_json::to_value(AdapterConfig::prefix_plus(&spec(), None)).unwrap();
    json.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
    let config: AdapterConfig = serde_json::from_value(json).unwrap();
    config.check().unwrap();
    config
}

/// Every option of prefix_plus at least once, alone and with others.
fn prefix_plus() -> Vec<Value> {
    let maps = ["elu", "elu_plus_one", "gelu", "relu", "silu", "softplus", "identity", "mlp"];
    let mut cases: Vec<Value> = maps.map(|map| json!({"feature_map": map})).into();
    cases.extend([
        json!({"query": "pre_rope"}),
        json!({"sharing": "kv_group"}),
        json!({"sharing": "layer"}),
        json!({"rank": 2}),
        json!({"gate": "scalar"}),
        json!({"gate": "head"}),
        json!({"normalizer": true}),
        json!({"layers": [1]}),
        json!({"feature_map": "mlp", "sharing": "layer", "rank": 3, "gate": "head", "normalizer": true}),
        json!({"feature_map": "softplus", "query": "pre_rope", "sharing": "kv_group", "rank": 2, "gate": "head"}),
        json!({"feature_map": "elu_plus_one", "sharing": "kv_group", "gate": "scalar", "normalizer": true, "init": "prompt"}),
    ]);
    cases
}

fn others() -> Vec<Value> {
    vec![
        json!({"method": "prefix", "num_virtual_tokens": 3, "init": "random"}),
        json!({"method": "prefix", "num_virtual_tokens": 2, "init": "random", "layers": [1]}),
        json!({"method": "prefix", "num_virtual_tokens": 3, "init": "random", "projection": true, "encoder_hidden_size": 5}),
        json!({"method": "lora", "rank": 2}),
        json!({"method": "lora", "rank": 2, "rslora": true, "targets": ["q_proj", "down_proj"], "layers": [0]}),
        json!({"method": "lora", "rank": 2, "dora": true, "rank_pattern": {"layers.1.mlp.up_proj": 3}}),
    ]
}

fn at_start(config: &AdapterConfig) -> Adapter {
    let tensors = config.method.as_method().tensors(config).unwrap();
    let tensors = tensors.into_iter().map(|(name, spec)| (name.clone(), spec.tensor(&name, 7).unwrap())).collect();
    Adapter::new(config.clone(), tensors).unwrap()
}

/// The adapter with every element moved, so that nothing is zero or one by chance.
fn moved(adapter: &Adapter) -> Adapter {
    let tensors = adapter.tensors().iter().map(|(name, tensor)| {
        let noise = (noise(name, tensor.dims()) * 0.4).unwrap();
        (name.clone(), (tensor.to_dtype(DType::F64).unwrap() + noise).unwrap())
    });
    Adapter::new(adapter.config().clone(), tensors.collect()).unwrap()
}

fn input() -> Input {
    let ids = [3, 9, 1, 20, 7, 0, 14, 2, 5, 5];
    let mask = [1, 1, 1, 1, 1, 0, 1, 1, 1, 1];
    Input::new(2, &ids, &mask, None).unwrap()
}

fn hidden(decoder: &Decoder, hook: &dyn SiteHook) -> Tensor {
    decoder.hidden_states(&input(), None, hook).unwrap()
}

fn flat(tensor: &Tensor) -> Vec<f64> {
    tensor.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

fn distance(left: &Tensor, right: &Tensor) -> f64 {
    flat(left).iter().zip(flat(right)).fold(0.0, |most: f64, (l, r)| most.max((l - r).abs()))
}

#[test]
fn prefix_plus_and_lora_start_as_the_base_model_and_have_gradients() {
    let decoder = decoder();
    let base = hidden(&decoder, &NoHook);
    for fields in prefix_plus().into_iter().chain(others()) {
        let config = config(fields.clone());
        if matches!(config.method, Method::Prefix(_)) {
            continue;
        }
        let mut start = at_start(&config);
        if let Method::Lora(lora) = &config.method
            && lora.dora
        {
            // as Lora::start does from a checkpoint
            for (layer, linear) in lora.sites(&config) {
                let role = crate::base::WeightRole::Weight(layer, linear);
                let weight = (noise(&role.name(), &spec().weight_shape(role)) * 0.6).unwrap();
                let norms = term::row_norms(&weight).unwrap();
                start.tensors.insert(format!("{}.magnitude", module_name(layer, linear)), norms);
            }
        }
        let (start, vars) = start.trainable(DType::F64, &Device::Cpu).unwrap();
        let found = hidden(&decoder, &*start.hook(&spec(), &Device::Cpu).unwrap());
        assert!(distance(&base, &found) < 1e-12, "{fields}: {}", distance(&base, &found));
        let gradients = found.sqr().unwrap().sum_all().unwrap().backward().unwrap();
        let learns = |var: &Var| gradients.get(var).is_some_and(|g| flat(g).iter().any(|x| *x != 0.0));
        assert!(vars.values().any(learns), "{fields}: nothing learns");
    }
}

#[test]
fn gradients_are_central_differences() {
    let decoder = decoder();
    // none of the padding, whose query sees no key
    let real = Tensor::new(&[1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0], &Device::Cpu).unwrap();
    let weights = noise("loss", &[2, 5, 12]).broadcast_mul(&real.reshape((2, 5, 1)).unwrap()).unwrap();
    let loss = |adapter: &Adapter| {
        let hook = adapter.hook(&spec(), &Device::Cpu).unwrap();
        hidden(&decoder, &*hook).mul(&weights).unwrap().sum_all().unwrap()
    };
    for fields in prefix_plus().into_iter().chain(others()) {
        let adapter = moved(&at_start(&config(fields.clone())));
        let (trainable, vars) = adapter.trainable(DType::F64, &Device::Cpu).unwrap();
        let gradients = loss(&trainable).backward().unwrap();
        let dora = matches!(&adapter.config().method, Method::Lora(lora) if lora.dora);
        for (name, var) in &vars {
            // DoRA lets no gradient through its norm: A and B are held against PEFT's gradients instead
            if dora && !name.ends_with("magnitude") {
                continue;
            }
            let gradient = flat(gradients.get(var).unwrap_or_else(|| panic!("{fields}: no gradient of {name}")));
            let values = flat(var);
            for index in [0, values.len() / 3, values.len() - 1] {
                let at = |step: f64| {
                    let mut moved = values.clone();
                    moved[index] += step;
                    let mut adapter = adapter.clone();
                    let tensor = Tensor::from_vec(moved, var.shape(), &Device::Cpu).unwrap();
                    adapter.tensors.insert(name.clone(), tensor);
                    flat(&loss(&adapter))[0]
                };
                let step = 1e-5;
                let expected = (at(step) - at(-step)) / (2.0 * step);
                let error = (gradient[index] - expected).abs() / (1.0 + expected.abs());
                assert!(error < 1e-7, "{fields} {name}[{index}]: {} and {expected}", gradient[index]);
            }
        }
    }
}

/// With everything on, against the formula in loops.
#[test]
fn the_term_is_the_formula() {
    let config = config(json!({
        "feature_map": "mlp", "query": "pre_rope", "sharing": "kv_group", "rank": 2, "gate": "head", "normalizer": true,
    }));
    let adapter = moved(&at_start(&config));
    let term = config.method.as_method().term(&config, 1).unwrap();
    let hook = TermHook::new(vec![None, Some(term)], 4, adapter.tensors().clone());
    let (batch, heads, seq, d) = (2, 4, 3, 6);
    let (other, query) = (noise("other", &[batch, heads, seq, d]), noise("query", &[batch, heads, seq, d]));
    let kv = noise("kv", &[batch, 2, seq, d]);
    let site =
        |layer| Site { layer, query: &other, unrotated: Some(&query), key: &kv, unrotated_key: Some(&kv), value: &kv };
    assert!(hook.term(&site(0)).unwrap().is_none());
    let found = flat(&hook.term(&site(1)).unwrap().unwrap());
    let get = |name: &str| flat(&adapter.tensors()[&format!("layers.1.{name}")]);
    let (a, b, w, bias, gate, k) = (get("A"), get("B"), get("W"), get("b"), get("gate"), get("k"));
    for (row, q) in flat(&query).chunks(d).enumerate() {
        let head = row / seq % heads;
        let g = head / 2;
        let phi: Vec<f64> = (0..d)
            .map(|j| ((0..d).map(|i| q[i] * w[(g * d + i) * d + j]).sum::<f64>() + bias[g * d + j]).max(0.0))
            .collect();
        let divisor = 1.0 + (0..d).map(|i| phi[i] * k[g * d + i]).sum::<f64>().abs();
        for out in 0..d {
            let m = |i: usize| (0..2).map(|r| a[(g * d + i) * 2 + r] * b[(g * 2 + r) * d + out]).sum::<f64>();
            let expected = gate[head] * (0..d).map(|i| phi[i] * m(i)).sum::<f64>() / divisor;
            assert!((found[row * d + out] - expected).abs() < 1e-13);
        }
    }
}

/// Linear attention over a prompt and the tokens after it is linear attention over the tokens alone, with what the prompt
/// left in M.
#[test]
fn a_prompt_s_memory_is_exact_for_linear_attention() {
    let (kv_heads, heads, prompt, seq, d) = (2, 4, 5, 3, 6);
    for (fields, pre) in [(json!({}), false), (json!({"sharing": "kv_group", "query": "pre_rope"}), true)] {
        let mut all = json!({"feature_map": "elu_plus_one", "init": "prompt", "prompt_scale": 1.0});
        all.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        let config = config(all);
        let Method::PrefixPlus(method) = &config.method else { panic!("another method") };
        let (key, value) = (noise("k", &[kv_heads, prompt + seq, d]), noise("v", &[kv_heads, prompt + seq, d]));
        let query = noise("q", &[1, heads, seq, d]);
        let part = |x: &Tensor| x.narrow(1, 0, prompt).unwrap().contiguous().unwrap();
        let (nothing, seen) = (part(&key.zeros_like().unwrap()), part(&key));
        let seen = prompt::Captured {
            key: if pre { nothing.clone() } else { seen.clone() },
            unrotated_key: if pre { seen } else { nothing },
            value: part(&value),
        };
        let (memory, _) = method.memory(&config, &seen).unwrap();
        let one = Tensor::ones((1, 1, 1), DType::F64, &Device::Cpu).unwrap();
        let tensors = [("layers.0.M".to_owned(), memory), ("layers.0.scale".to_owned(), one)].into();
        let hook = TermHook::new(vec![method.term(&config, 0)], heads, tensors);
        let zeros = query.zeros_like().unwrap();
        let (rotated, unrotated) = if pre { (&zeros, Some(&query)) } else { (&query, None) };
        let site = Site { layer: 0, query: rotated, unrotated, key: &query, unrotated_key: None, value: &query };
        let term = flat(&hook.term(&site).unwrap().unwrap());
        let phi = |x: f64| if x > 0.0 { x + 1.0 } else { x.exp() };
        let (q, k, v) = (flat(&query), flat(&key), flat(&value));
        for (row, q) in q.chunks(d).enumerate() {
            let (head, i) = (row / seq, row % seq);
            let attend = |from: usize, out: usize| -> f64 {
                let kv = |j: usize| (head / 2 * (prompt + seq) + j) * d;
                let weight = |j: usize| (0..d).map(|n| phi(q[n]) * phi(k[kv(j) + n])).sum::<f64>();
                (from..=prompt + i).map(|j| weight(j) * v[kv(j) + out]).sum()
            };
            for out in 0..d {
                let (whole, tokens) = (attend(0, out), attend(prompt, out));
                assert!((whole - tokens - term[row * d + out]).abs() < 1e-12);
            }
        }
    }
}

/// The keys and values that a prompt leaves are those of the decoder's own cache, and with them prefix tuning starts as
/// the model after that prompt.
#[test]
fn a_prefix_from_a_prompt_is_the_prompt() {
    let decoder = decoder();
    let (prompt, tokens) = ([4u32, 11, 6, 17], [3u32, 9, 1]);
    let seen = prompt::capture(&decoder, &prompt).unwrap();
    let mut cache = KvCache::new(2);
    decoder.hidden_states(&Input::row(&prompt).unwrap(), Some(&mut cache), &NoHook).unwrap();
    let mut tensors = Tensors::new();
    for (layer, seen) in seen.iter().enumerate() {
        let (keys, values) = cache.layer(layer).unwrap();
        assert!(distance(&seen.key, &keys.get(0).unwrap()) < 1e-6);
        assert!(distance(&seen.value, &values.get(0).unwrap()) < 1e-6);
        tensors.insert(format!("layers.{layer}.key"), keys.get(0).unwrap());
        tensors.insert(format!("layers.{layer}.value"), values.get(0).unwrap());
    }
    let config = config(json!({"method": "prefix", "num_virtual_tokens": 4, "init": "prompt"}));
    let adapter = Adapter::new(config, tensors).unwrap();
    let hook = adapter.hook(&spec(), &Device::Cpu).unwrap();
    let found = decoder.hidden_states(&Input::row(&tokens).unwrap(), None, &*hook).unwrap();
    let whole: Vec<u32> = prompt.iter().chain(&tokens).copied().collect();
    let whole = decoder.hidden_states(&Input::row(&whole).unwrap(), None, &NoHook).unwrap();
    assert!(distance(&found, &whole.narrow(1, 4, 3).unwrap()) < 1e-12);
}

/// LoRA in a decoder is the decoder whose weights hold `W + s·BA`.
#[test]
fn lora_is_the_merged_weight() {
    for fields in [
        json!({"rank": 2, "alpha": 5.0}),
        json!({"rank": 3, "alpha": 5.0, "rslora": true}),
        json!({"rank": 2, "dora": true}),
    ] {
        let mut all = json!({"method": "lora"});
        all.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        let config = config(all);
        let adapter = moved(&at_start(&config));
        let Method::Lora(lora) = &config.method else { panic!("another method") };
        let merged = Decoder::from_weights(&spec(), |weight: &WeightShape| {
            let scale = if weight.shape.len() == 1 { 1.0 } else { 0.6 };
            let plain = (noise(&weight.name, &weight.shape) * scale).unwrap();
            let crate::base::WeightRole::Weight(layer, linear) = weight.role else { return Ok(plain) };
            let map = lora.map(adapter.tensors(), layer, linear).unwrap();
            let scale = if lora.rslora { 5.0 / 3f64.sqrt() } else { lora.alpha / 2.0 };
            let sum = (plain + (map.b.matmul(&map.a).unwrap() * scale).unwrap()).unwrap();
            let Some(magnitude) = &map.magnitude else { return Ok(sum) };
            let ratio = (magnitude / term::row_norms(&sum).unwrap()).unwrap();
            Ok(sum.broadcast_mul(&ratio.unsqueeze(1).unwrap()).unwrap())
        })
        .unwrap();
        let found = hidden(&decoder(), &*adapter.hook(&spec(), &Device::Cpu).unwrap());
        assert!(distance(&found, &hidden(&merged, &NoHook)) < 1e-11, "{fields}");
    }
}

#[test]
fn patterns_take_the_longest_end() {
    let config = config(json!({
        "method": "lora", "rank": 2, "alpha": 8.0, "rank_pattern": {"q_proj": 4, "layers.1.self_attn.q_proj": 1},
        "alpha_pattern": {"proj": 3.0},
    }));
    let Method::Lora(lora) = &config.method else { panic!("another method") };
    let name = |layer| module_name(layer, Linear::Query);
    assert_eq!((lora.rank_of(&name(0)), lora.rank_of(&name(1)), lora.alpha_of(&name(0))), (4, 1, 8.0));
}

#[test]
fn what_is_random_follows_from_seed_and_name() {
    let spec = TensorSpec::new([4, 5], Start::Normal(2.0));
    let of = |name: &str, seed| flat(&spec.tensor(name, seed).unwrap());
    assert_eq!(of("a", 1), of("a", 1));
    assert!(of("a", 1) != of("b", 1) && of("a", 1) != of("a", 2));
    let many = flat(&TensorSpec::new([200, 200], Start::Normal(2.0)).tensor("n", 0).unwrap());
    let mean = many.iter().sum::<f64>() / 4e4;
    let deviation = (many.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / 4e4).sqrt();
    assert!(mean.abs() < 0.05 && (deviation - 2.0).abs() < 0.05, "{mean} {deviation}");
    let identity = flat(&TensorSpec::new([2, 2, 2], Start::Identity).tensor("i", 0).unwrap());
    assert_eq!(identity, [1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0]);
}

/// Dropout acts while a pass of training is at hand, is the same for the same pass, and leaves the mean as it is.
#[test]
fn dropout_is_of_a_training_pass_and_leaves_the_mean() {
    let config = config(json!({"method": "lora", "rank": 2, "dropout": 0.25, "targets": null}));
    let tensors = config.method.as_method().tensors(&config).unwrap();
    let tensors = tensors.into_iter().map(|(name, spec)| {
        let tensor = noise(&name, &spec.shape).to_dtype(DType::F32).unwrap();
        (name, tensor)
    });
    let spec = spec();
    let hook = Adapter::new(config, tensors.collect()).unwrap().hook(&spec, &Device::Cpu).unwrap();
    let [out, width] = spec.linear_shape(Linear::Query);
    let input = noise("input", &[1, 4, width]).to_dtype(DType::F32).unwrap();
    let zeros = |shape: &[usize]| Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap();
    let (weight, output) = (zeros(&[out, width]), zeros(&[1, 4, out]));
    let run = |layer| {
        let map =
            LinearMap { layer, linear: Linear::Query, input: &input, weight: &weight, bias: None, output: &output };
        hook.linear(&map).unwrap().unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap()
    };
    let plain = run(0);
    assert_eq!(run(0), plain, "nothing is left out in use");
    hook.begin_pass(7);
    let dropped = run(0);
    assert!(dropped != plain && run(0) == dropped, "the same pass leaves out the same");
    hook.begin_pass(8);
    assert!(run(0) != dropped);
    let passes = 4000;
    let (mut sums, mut squares) = (vec![0f64; plain.len()], vec![0f64; plain.len()]);
    for pass in 0..passes {
        hook.begin_pass(pass);
        for ((sum, square), value) in sums.iter_mut().zip(&mut squares).zip(run(0)) {
            *sum += f64::from(value);
            *square += f64::from(value).powi(2);
        }
    }
    for ((sum, square), plain) in sums.iter().zip(&squares).zip(&plain) {
        let count = passes as f64;
        let (mean, variance) = (sum / count, square / count - (sum / count).powi(2));
        assert!((mean - f64::from(*plain)).abs() < 6.0 * (variance / count).sqrt() + 1e-6, "{mean} vs {plain}");
    }
}
