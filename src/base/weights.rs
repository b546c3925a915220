//! The weights of a decoder: what each does, its shape, and where a checkpoint keeps it.

use candle_core::Tensor;

use super::{DecoderSpec, Norm, QkNormOver, Wiring};

/// The linear maps of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Linear {
    /// `[num_heads · head_dim, hidden_size]`.
    Query,
    /// `[num_kv_heads · head_dim, hidden_size]`.
    Key,
    /// `[num_kv_heads · head_dim, hidden_size]`.
    Value,
    /// `[hidden_size, num_heads · head_dim]`.
    AttentionOutput,
    /// `[intermediate_size, hidden_size]`; only in a gated MLP.
    Gate,
    /// `[intermediate_size, hidden_size]`.
    Up,
    /// `[hidden_size, intermediate_size]`.
    Down,
}

impl Linear {
    /// All of them, in the order in which a layer uses them.
    pub const ALL: [Self; 7] =
        [Self::Query, Self::Key, Self::Value, Self::AttentionOutput, Self::Gate, Self::Up, Self::Down];

    /// The module's path inside its layer, as transformers names it in a Llama.
    pub fn module(self) -> &'static str {
        match self {
            Self::Query => "self_attn.q_proj",
            Self::Key => "self_attn.k_proj",
            Self::Value => "self_attn.v_proj",
            Self::AttentionOutput => "self_attn.o_proj",
            Self::Gate => "mlp.gate_proj",
            Self::Up => "mlp.up_proj",
            Self::Down => "mlp.down_proj",
        }
    }
}

/// Where a layer normalises.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum NormSite {
    /// Before attention; before both blocks where they share a norm; after the sum with [`Wiring::SumNorm`].
    Attention,
    /// After attention, where there is a norm before it too, or only there.
    AttentionOutput,
    /// Before the MLP; after the sum with [`Wiring::SumNorm`].
    Mlp,
    /// After the MLP.
    MlpOutput,
    /// Queries.
    Query,
    /// Keys.
    Key,
}

/// One weight tensor by what it does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum WeightRole {
    /// Token embedding, `[vocab_size, embedding width]`.
    Embedding,
    /// Position embedding, `[rows, hidden_size]`.
    Positions,
    /// From the token embedding to the stream, `[hidden_size, embedding width]`.
    EmbeddingProjection,
    /// A norm's weight, `[width]`; `[heads, head_dim]` where each head has its own.
    Norm(usize, NormSite),
    /// A norm's bias, of the weight's shape.
    NormBias(usize, NormSite),
    /// A linear map's matrix, `[out, in]`.
    Weight(usize, Linear),
    /// A linear map's bias, `[out]`.
    Bias(usize, Linear),
    /// The norm after the last layer, `[hidden_size]`.
    FinalNorm,
    /// Its bias.
    FinalNormBias,
    /// From the stream to what the head reads, `[embedding width, hidden_size]`.
    HeadProjection,
    /// Output projection, `[vocab_size, embedding width]`; the embedding itself where it is tied.
    Head,
    /// Its bias, `[vocab_size]`.
    HeadBias,
}

impl WeightRole {
    /// Prefold's name of the weight, that of transformers' Llama where it has one.
    pub fn name(self) -> String {
        let layer = |layer: usize, module: &str, kind: &str| format!("model.layers.{layer}.{module}.{kind}");
        match self {
            Self::Embedding => "model.embed_tokens.weight".into(),
            Self::Positions => "model.embed_positions.weight".into(),
            Self::EmbeddingProjection => "model.project_in.weight".into(),
            Self::Norm(index, site) => layer(index, site.module(), "weight"),
            Self::NormBias(index, site) => layer(index, site.module(), "bias"),
            Self::Weight(index, linear) => layer(index, linear.module(), "weight"),
            Self::Bias(index, linear) => layer(index, linear.module(), "bias"),
            Self::FinalNorm => "model.norm.weight".into(),
            Self::FinalNormBias => "model.norm.bias".into(),
            Self::HeadProjection => "model.project_out.weight".into(),
            Self::Head => "lm_head.weight".into(),
            Self::HeadBias => "lm_head.bias".into(),
        }
    }

    /// The layer it belongs to, and the same weight of layer 0.
    fn split_layer(self) -> (Option<usize>, Self) {
        match self {
            Self::Norm(layer, site) => (Some(layer), Self::Norm(0, site)),
            Self::NormBias(layer, site) => (Some(layer), Self::NormBias(0, site)),
            Self::Weight(layer, linear) => (Some(layer), Self::Weight(0, linear)),
            Self::Bias(layer, linear) => (Some(layer), Self::Bias(0, linear)),
            other => (None, other),
        }
    }
}

impl NormSite {
    /// Prefold's name of the module; a family whose checkpoints call it otherwise says so in its [`WeightNames`].
    fn module(self) -> &'static str {
        match self {
            Self::Attention => "input_layernorm",
            Self::AttentionOutput => "attention_output_layernorm",
            Self::Mlp => "post_attention_layernorm",
            Self::MlpOutput => "mlp_output_layernorm",
            Self::Query => "self_attn.q_norm",
            Self::Key => "self_attn.k_norm",
        }
    }
}

/// Where a checkpoint keeps a weight.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    /// The tensor's name; `{}` stands for the layer.
    pub name: String,
    /// Which part of the tensor.
    pub part: Part,
    /// Whether the tensor is kept as `[in, out]`.
    pub transposed: bool,
}

/// Which part of a tensor a weight is. Rows are counted along the weight's first dimension, after transposing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// All of it.
    Whole,
    /// Rows `start..start + count` of `of`.
    Rows {
        /// The first.
        start: usize,
        /// How many.
        count: usize,
        /// How many the tensor has.
        of: usize,
    },
    /// Seen as `[groups, of, width, …]`, all groups' entry `index`.
    Interleaved {
        /// Which entry of a group.
        index: usize,
        /// Entries in a group.
        of: usize,
        /// Rows of an entry.
        width: usize,
    },
    /// Stacked from `count` tensors, whose names hold a second `{}` for their number.
    Stacked {
        /// How many.
        count: usize,
    },
}

/// The names of a family's weights where they are not prefold's own.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct WeightNames {
    /// By the role in layer 0.
    entries: Vec<(WeightRole, Source)>,
    /// Beginnings of names, and others that checkpoints have in their place.
    beginnings: Vec<(&'static str, &'static str)>,
    /// A beginning of all of these names, and what transformers has in its place.
    moved: Option<(&'static str, &'static str)>,
    /// Modules of the model that are no part of the decoder.
    beside: &'static [&'static str],
}

impl WeightNames {
    /// Prefold's own names, which are Llama's.
    pub fn llama() -> Self {
        Self::default()
    }

    /// The same with one weight kept elsewhere. `role` is that of layer 0 and stands for all layers.
    #[must_use]
    pub fn with(mut self, role: WeightRole, name: &str) -> Self {
        self.set(role, Source { name: name.into(), part: Part::Whole, transposed: false });
        self
    }

    /// The same with one weight kept as described.
    #[must_use]
    pub fn with_source(mut self, role: WeightRole, source: Source) -> Self {
        self.set(role, source);
        self
    }

    /// The same with a linear map's weight and bias kept as `{module}.weight` and `{module}.bias`, or a part of these.
    #[must_use]
    pub fn with_linear(mut self, linear: Linear, module: &str, part: Part, transposed: bool) -> Self {
        let source = |kind, transposed| Source { name: format!("{module}.{kind}"), part, transposed };
        self.set(WeightRole::Weight(0, linear), source("weight", transposed));
        self.set(WeightRole::Bias(0, linear), source("bias", false));
        self
    }

    /// The same with a layer's norm kept as `{module}.weight` and `{module}.bias`.
    #[must_use]
    pub fn with_norm(self, site: NormSite, module: &str) -> Self {
        self.with(WeightRole::Norm(0, site), &format!("{module}.weight"))
            .with(WeightRole::NormBias(0, site), &format!("{module}.bias"))
    }

    /// The same where tensors whose names begin with `ours` may be found under names that begin with `theirs`.
    #[must_use]
    pub fn or_under(mut self, ours: &'static str, theirs: &'static str) -> Self {
        self.beginnings.push((ours, theirs));
        self
    }

    /// The same with another beginning in the place of one, for the weights of a decoder inside a larger model.
    #[must_use]
    pub fn moved(mut self, from: &'static str, to: &'static str) -> Self {
        self.moved = Some((from, to));
        self
    }

    /// The same for a model that has modules beside the decoder, which text does not pass.
    #[must_use]
    pub fn beside(mut self, modules: &'static [&'static str]) -> Self {
        self.beside = modules;
        self
    }

    /// Whether the model has such modules.
    pub fn has_beside(&self) -> bool {
        !self.beside.is_empty()
    }

    /// Whether a module's path leads into a part of the model that text does not pass.
    pub fn is_beside(&self, path: &str) -> bool {
        path.split('.').any(|module| self.beside.contains(&module))
    }

    /// The other names under which a checkpoint may keep a tensor.
    pub fn alternatives(&self, name: &str) -> impl Iterator<Item = String> {
        self.beginnings.iter().filter_map(|(ours, theirs)| Some(format!("{theirs}{}", name.strip_prefix(ours)?)))
    }

    fn set(&mut self, role: WeightRole, source: Source) {
        self.entries.retain(|(known, _)| *known != role);
        self.entries.push((role, source));
    }

    /// Where a weight is kept, its layer filled in.
    pub fn source(&self, role: WeightRole) -> Source {
        let (layer, key) = role.split_layer();
        let mut source = match self.entries.iter().find(|(known, _)| *known == key) {
            Some((_, source)) => match layer {
                Some(layer) => Source { name: source.name.replacen("{}", &layer.to_string(), 1), ..source.clone() },
                None => source.clone(),
            },
            None => Source { name: role.name(), part: Part::Whole, transposed: false },
        };
        if let Some((from, to)) = self.moved
            && let Some(rest) = source.name.strip_prefix(from)
        {
            source.name = format!("{to}{rest}");
        }
        source
    }
}

impl Source {
    /// The tensors that hold the weight, with the shapes that they must have for it to have `shape`.
    pub fn tensors(&self, shape: &[usize]) -> Vec<(String, Vec<usize>)> {
        let rows = shape.first().copied().unwrap_or(1);
        let with_rows = |rows: usize| {
            let mut shape = shape.to_vec();
            if let Some(first) = shape.first_mut() {
                *first = rows;
            }
            if self.transposed {
                shape.reverse();
            }
            shape
        };
        match self.part {
            Part::Whole => vec![(self.name.clone(), with_rows(rows))],
            Part::Rows { of, .. } => vec![(self.name.clone(), with_rows(of))],
            Part::Interleaved { of, .. } => vec![(self.name.clone(), with_rows(rows.saturating_mul(of)))],
            Part::Stacked { count } => {
                let shape = shape.get(1..).unwrap_or_default();
                (0..count).map(|index| (self.name.replacen("{}", &index.to_string(), 1), shape.to_vec())).collect()
            }
        }
    }
}

impl Source {
    /// The weight of `shape` out of the tensors that hold it.
    ///
    /// # Errors
    /// When the tensors have not the shapes that [`tensors`](Self::tensors) says.
    pub fn part_of(&self, tensors: &[Tensor], shape: &[usize]) -> candle_core::Result<Tensor> {
        if let Part::Stacked { .. } = self.part {
            return Tensor::stack(tensors, 0);
        }
        let Some(tensor) = tensors.first() else { candle_core::bail!("no tensor holds the weight") };
        let tensor = if self.transposed { tensor.t()? } else { tensor.clone() };
        match self.part {
            Part::Rows { start, count, .. } => tensor.narrow(0, start, count),
            Part::Interleaved { index, of, width } => {
                let columns: usize = shape.iter().skip(1).product();
                tensor.reshape(((), of, width, columns))?.narrow(1, index, 1)?.reshape(shape)
            }
            Part::Whole | Part::Stacked { .. } => Ok(tensor),
        }
    }
}

impl Source {
    /// `whole`, the tensor that holds the weight, with another weight in its place. Not of a stacked one, which several
    /// tensors hold.
    ///
    /// # Errors
    /// When the shapes do not fit.
    pub fn put(&self, whole: &Tensor, weight: &Tensor) -> candle_core::Result<Tensor> {
        let turned = |tensor: &Tensor| if self.transposed { tensor.t()?.contiguous() } else { tensor.contiguous() };
        match self.part {
            Part::Whole => turned(weight),
            Part::Rows { start, .. } => turned(&turned(whole)?.slice_scatter(weight, 0, start)?),
            Part::Interleaved { index, of, width } => {
                let whole = turned(whole)?;
                let (rows, shape) = (whole.dim(0)?, whole.shape().clone());
                let columns = whole.elem_count() / rows.max(1);
                let entry = weight.reshape(((), 1, width, columns))?;
                turned(&whole.reshape(((), of, width, columns))?.slice_scatter(&entry, 1, index)?.reshape(shape)?)
            }
            Part::Stacked { .. } => candle_core::bail!("several tensors hold the weight"),
        }
    }
}

/// A weight that a decoder needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WeightShape {
    /// What it does.
    pub role: WeightRole,
    /// Prefold's name of it.
    pub name: String,
    /// Its shape.
    pub shape: Vec<usize>,
}

impl DecoderSpec {
    /// `[out, in]` of a linear map.
    pub fn linear_shape(&self, linear: Linear) -> [usize; 2] {
        let (queries, keys) = (self.attention.query_width(), self.attention.kv_width());
        match linear {
            Linear::Query => [queries, self.hidden_size],
            Linear::Key | Linear::Value => [keys, self.hidden_size],
            Linear::AttentionOutput => [self.hidden_size, queries],
            Linear::Gate | Linear::Up => [self.mlp.intermediate_size, self.hidden_size],
            Linear::Down => [self.hidden_size, self.mlp.intermediate_size],
        }
    }

    /// The linear maps of a layer.
    pub fn linears(&self) -> impl Iterator<Item = Linear> {
        let gated = self.mlp.gated;
        Linear::ALL.into_iter().filter(move |linear| gated || *linear != Linear::Gate)
    }

    /// Whether a linear map has a bias.
    pub fn has_bias(&self, linear: Linear) -> bool {
        match linear {
            Linear::Query | Linear::Key | Linear::Value => self.attention.qkv_bias,
            Linear::AttentionOutput => self.attention.output_bias,
            Linear::Gate | Linear::Up | Linear::Down => self.mlp.bias,
        }
    }

    /// The norms of a layer.
    pub fn norms(&self) -> Vec<(NormSite, Norm)> {
        use NormSite::{Attention, AttentionOutput, Key, Mlp, MlpOutput, Query};
        let sites: &[NormSite] = match self.wiring {
            Wiring::PreNorm | Wiring::Parallel | Wiring::SumNorm => &[Attention, Mlp],
            Wiring::PostNorm => &[AttentionOutput, MlpOutput],
            Wiring::SandwichNorm => &[Attention, AttentionOutput, Mlp, MlpOutput],
            Wiring::ParallelSharedNorm => &[Attention],
        };
        let stream = sites.iter().map(|site| (*site, self.norm));
        let heads = self.attention.qk_norm.iter().flat_map(|qk| [(Query, qk.norm), (Key, qk.norm)]);
        stream.chain(heads).collect()
    }

    /// The shape of a weight.
    pub fn weight_shape(&self, role: WeightRole) -> Vec<usize> {
        let (hidden, width) = (self.hidden_size, self.embedding_width());
        match role {
            WeightRole::Embedding | WeightRole::Head => vec![self.vocab_size, width],
            WeightRole::Positions => vec![self.embedding.positions.map_or(0, |positions| positions.rows), hidden],
            WeightRole::EmbeddingProjection => vec![hidden, width],
            WeightRole::HeadProjection => vec![width, hidden],
            WeightRole::Norm(_, site) | WeightRole::NormBias(_, site) => self.norm_shape(site),
            WeightRole::FinalNorm | WeightRole::FinalNormBias => vec![hidden],
            WeightRole::Weight(_, linear) => self.linear_shape(linear).to_vec(),
            WeightRole::Bias(_, linear) => vec![self.linear_shape(linear)[0]],
            WeightRole::HeadBias => vec![self.vocab_size],
        }
    }

    fn norm_shape(&self, site: NormSite) -> Vec<usize> {
        let heads = match site {
            NormSite::Query => self.attention.num_heads,
            NormSite::Key => self.attention.num_kv_heads,
            _ => return vec![self.hidden_size],
        };
        match self.attention.qk_norm.map(|qk| qk.over) {
            Some(QkNormOver::HeadOwnWeight) => vec![heads, self.attention.head_dim],
            Some(QkNormOver::Projection) => vec![heads.saturating_mul(self.attention.head_dim)],
            _ => vec![self.attention.head_dim],
        }
    }

    /// Every weight in the order of use; a tied head is not listed again.
    pub fn weights(&self) -> Vec<WeightShape> {
        let mut roles = vec![WeightRole::Embedding];
        roles.extend(self.embedding.width.map(|_| WeightRole::EmbeddingProjection));
        roles.extend(self.embedding.positions.map(|_| WeightRole::Positions));
        let norms = self.norms();
        for layer in 0..self.num_layers {
            let mut norm = |site: NormSite| {
                for (_, norm) in norms.iter().filter(|(known, _)| *known == site) {
                    roles.push(WeightRole::Norm(layer, site));
                    roles.extend(norm.bias.then_some(WeightRole::NormBias(layer, site)));
                }
            };
            norm(NormSite::Attention);
            norm(NormSite::Query);
            norm(NormSite::Key);
            norm(NormSite::AttentionOutput);
            norm(NormSite::Mlp);
            norm(NormSite::MlpOutput);
            for linear in self.linears() {
                roles.push(WeightRole::Weight(layer, linear));
                roles.extend(self.has_bias(linear).then_some(WeightRole::Bias(layer, linear)));
            }
        }
        if self.final_norm {
            roles.push(WeightRole::FinalNorm);
            roles.extend(self.norm.bias.then_some(WeightRole::FinalNormBias));
        }
        roles.extend(self.embedding.width.map(|_| WeightRole::HeadProjection));
        roles.extend((!self.head.tied).then_some(WeightRole::Head));
        roles.extend(self.head.bias.then_some(WeightRole::HeadBias));
        roles.into_iter().map(|role| WeightShape { role, name: role.name(), shape: self.weight_shape(role) }).collect()
    }

    /// Number of parameters; a tied head counts once.
    pub fn num_parameters(&self) -> usize {
        self.weights().iter().map(|w| w.shape.iter().product::<usize>()).sum()
    }
}
