//! The modules of a transformers model and the linear maps that each holds.

use candle_core::{Device, Tensor};

use crate::base::{DecoderSpec, Linear, Source, WeightNames, WeightRole};

/// A module with a weight matrix.
#[derive(Debug)]
pub(super) struct Module {
    /// Its path, `model.layers.0.self_attn.q_proj`.
    pub(super) name: String,
    pub(super) layer: usize,
    /// `[out, in]` of the whole.
    pub(super) shape: [usize; 2],
    /// Whether the checkpoint keeps it as `[in, out]`, as GPT-2's `Conv1D` does.
    pub(super) transposed: bool,
    pub(super) parts: Vec<ModulePart>,
}

/// A linear map in a module.
#[derive(Debug)]
pub(super) struct ModulePart {
    pub(super) linear: Linear,
    /// Outputs of the map.
    pub(super) rows: usize,
    source: Source,
}

/// The modules of all layers.
pub(super) fn modules(spec: &DecoderSpec) -> Vec<Module> {
    let mut modules: Vec<Module> = Vec::new();
    for layer in 0..spec.num_layers {
        for linear in spec.linears() {
            let source = spec.names.source(WeightRole::Weight(layer, linear));
            let [rows, width] = spec.linear_shape(linear);
            let stored = source.tensors(&[rows, width]).into_iter().next();
            let Some((name, mut dims)) = stored else { continue };
            if source.transposed {
                dims.reverse();
            }
            let [out, width] = dims[..] else { continue };
            let name = name.strip_suffix(".weight").unwrap_or(&name).to_owned();
            let transposed = source.transposed;
            let part = ModulePart { linear, rows, source: Source { transposed: false, ..source } };
            match modules.iter_mut().find(|module| module.name == name) {
                Some(module) => module.parts.push(part),
                None => modules.push(Module { name, layer, shape: [out, width], transposed, parts: vec![part] }),
            }
        }
    }
    modules
}

/// The module of a path, which may have more or fewer leading names than transformers', or those of another version.
pub(super) fn find<'a>(modules: &'a [Module], path: &str, names: &WeightNames) -> Option<&'a Module> {
    let ends =
        |long: &str, short: &str| long.strip_suffix(short).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'));
    let is_named = |name: &str| ends(path, name) || ends(name, path);
    modules.iter().find(|module| is_named(&module.name) || names.alternatives(&module.name).any(|name| is_named(&name)))
}

impl ModulePart {
    /// The part's rows of a tensor over all rows of the module.
    pub(super) fn rows_of(&self, whole: &Tensor) -> candle_core::Result<Tensor> {
        let mut shape = whole.dims().to_vec();
        if let Some(first) = shape.first_mut() {
            *first = self.rows;
        }
        self.source.part_of(std::slice::from_ref(whole), &shape)?.contiguous()
    }
}

impl Module {
    /// A tensor over all rows out of those of the parts, given in the parts' order.
    pub(super) fn join(&self, parts: &[Tensor]) -> candle_core::Result<Tensor> {
        let numbers = Tensor::arange(0u32, self.shape[0] as u32, &Device::Cpu)?.unsqueeze(1)?;
        let mut place = vec![0u32; self.shape[0]];
        let mut next = 0u32;
        for part in &self.parts {
            for row in part.rows_of(&numbers)?.flatten_all()?.to_vec1::<u32>()? {
                if let Some(place) = place.get_mut(row as usize) {
                    *place = next;
                }
                next += 1;
            }
        }
        Tensor::cat(parts, 0)?.index_select(&Tensor::new(place, &Device::Cpu)?, 0)
    }
}
