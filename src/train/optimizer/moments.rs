//! Where the moments of the optimizer are: in memory, or in a file.
//!
//! A step reads and writes each moment once, in the order of the variables, so that a file serves: with it no more than a few
//! chunks of them are in memory (arXiv 2104.07857 offloads optimizer states so). The numbers are the same.

use std::borrow::Cow;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{CpuStorage, DType, Device, InplaceOp2, Layout, Result, Shape, Tensor, Var};
use rayon::prelude::*;
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, View};

use super::{Decay, Update, floats, floats_mut, is_in_place};
use crate::files::{self, MappedFile, ScratchFile};

/// First and second moment of each variable, float32.
#[derive(Debug)]
pub(super) enum Moments {
    Held(BTreeMap<String, [Tensor; 2]>),
    Offloaded(Offloaded),
}

/// Moments in a file that only this process has.
#[derive(Debug)]
pub(super) struct Offloaded {
    file: ScratchFile,
    places: BTreeMap<String, Place>,
}

#[derive(Clone, Debug)]
struct Place {
    /// Where the first moment begins; the second follows it.
    start: u64,
    shape: Shape,
}

/// What the two moments are called where they are saved.
const NAMES: [&str; 2] = ["first", "second"];
const FLOAT: u64 = size_of::<f32>() as u64;
/// Elements that a task holds of each moment at a time.
const CHUNK: usize = 1 << 16;

impl Moments {
    /// Zeros in memory, where the variables are.
    pub(super) fn held(vars: &BTreeMap<String, Var>) -> Result<Self> {
        let zeros = |var: &Var| Tensor::zeros(var.shape(), DType::F32, var.device());
        // each is changed where it lies
        let moments = vars.iter().map(|(name, var)| Ok((name.clone(), [zeros(var)?, zeros(var)?])));
        moments.collect::<Result<_>>().map(Self::Held)
    }

    /// Zeros in a file in `folder`.
    pub(super) fn offloaded(vars: &BTreeMap<String, Var>, folder: &Path) -> files::Result<Self> {
        let mut end = 0;
        let mut place = |var: &Var| {
            let start = end;
            end += 2 * FLOAT * var.elem_count() as u64;
            Place { start, shape: var.shape().clone() }
        };
        let places = vars.iter().map(|(name, var)| (name.clone(), place(var))).collect();
        Ok(Self::Offloaded(Offloaded { file: ScratchFile::new(folder, end)?, places }))
    }

    /// Writes a safetensors file of `{variable}.first` and `{variable}.second`.
    pub(super) fn save(&self, path: &Path) -> std::result::Result<(), String> {
        let failed = RefCell::new(None);
        let save = |views: Vec<(String, Moment)>| safetensors::serialize_to_file(views, None, path);
        let named = |name: &str, which: usize| format!("{name}.{}", NAMES[which]);
        let written = match self {
            Self::Held(moments) => save(
                moments
                    .iter()
                    .flat_map(|(name, pair)| {
                        pair.iter().enumerate().map(move |(which, moment)| (named(name, which), Moment::Tensor(moment)))
                    })
                    .collect(),
            ),
            Self::Offloaded(Offloaded { file, places }) => {
                let failed = &failed;
                let moment = |place, which| Moment::InFile { file, place, which, failed };
                save(
                    places
                        .iter()
                        .flat_map(|(name, place)| [0, 1].map(|which| (named(name, which), moment(place, which))))
                        .collect(),
                )
            }
        };
        match failed.into_inner() {
            Some(error) => Err(error),
            None => written.map_err(|error| error.to_string()),
        }
    }

    /// Takes over what [`save`](Self::save) wrote. The reason where a tensor is missing or misshapen.
    pub(super) fn restore(&mut self, saved: &MappedFile) -> std::result::Result<(), String> {
        let parsed = SafeTensors::deserialize(saved.bytes()).map_err(|error| error.to_string())?;
        let bytes = |name: &str, which: usize, shape: &Shape| {
            let name = format!("{name}.{}", NAMES[which]);
            match parsed.tensor(&name) {
                Ok(view) if view.shape() == shape.dims() && view.dtype() == Dtype::F32 => Ok(view.data()),
                Ok(view) => {
                    Err(format!("{name} is {:?} {:?}, the adapter's is F32 {shape:?}", view.dtype(), view.shape()))
                }
                Err(_) => Err(format!("it has no {name}")),
            }
        };
        match self {
            Self::Held(moments) => {
                for (name, pair) in moments {
                    for (which, moment) in pair.iter_mut().enumerate() {
                        let bytes = bytes(name, which, moment.shape())?;
                        let read = Tensor::from_raw_buffer(bytes, DType::F32, moment.dims(), moment.device());
                        *moment = read.map_err(|error| error.to_string())?;
                    }
                }
            }
            Self::Offloaded(Offloaded { file, places }) => {
                for (name, place) in places {
                    for which in [0, 1] {
                        let bytes = bytes(name, which, &place.shape)?;
                        file.write(place.of(which), bytes).map_err(|error| error.to_string())?;
                    }
                }
            }
        }
        Ok(())
    }
}

impl Place {
    /// Where a moment begins.
    fn of(&self, which: usize) -> u64 {
        self.start + which as u64 * self.bytes()
    }

    /// Of one moment.
    fn bytes(&self) -> u64 {
        FLOAT * self.shape.elem_count() as u64
    }
}

impl Offloaded {
    /// Moves a variable and its moments along a gradient.
    pub(super) fn step(
        &self,
        (name, var): (&str, &Var),
        gradient: &Tensor,
        decays: &[Decay; 2],
        update: &Update,
    ) -> Result<()> {
        let Some(place) = self.places.get(name) else { candle_core::bail!("{name} has no moments") };
        let op = OffloadedStep { file: &self.file, place, decays, update };
        if is_in_place(var) && var.dtype() == DType::F32 {
            return var.as_tensor().inplace_op2(gradient, &op);
        }
        let here = |x: &Tensor| x.to_device(&Device::Cpu)?.to_dtype(DType::F32)?.contiguous();
        let value = here(&var.as_detached_tensor())?;
        value.inplace_op2(&here(gradient)?, &op)?;
        var.set(&value.to_dtype(var.dtype())?.to_device(var.device())?)
    }
}

struct OffloadedStep<'a> {
    file: &'a ScratchFile,
    place: &'a Place,
    decays: &'a [Decay; 2],
    update: &'a Update,
}

impl OffloadedStep<'_> {
    /// Of the elements from `at` on.
    fn chunk(&self, at: usize, value: &mut [f32], gradient: &[f32]) -> files::Result<()> {
        let mut bytes = vec![0; size_of_val(value)];
        let start = |which| self.place.of(which) + FLOAT * at as u64;
        let mut pair = [Vec::new(), Vec::new()];
        for ((which, decay), moment) in self.decays.iter().enumerate().zip(&mut pair) {
            self.file.read(start(which), &mut bytes)?;
            *moment = bytes.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
            decay.apply(moment, gradient);
            for (bytes, number) in bytes.as_chunks_mut().0.iter_mut().zip(moment.iter()) {
                *bytes = number.to_le_bytes();
            }
            self.file.write(start(which), &bytes)?;
        }
        let [first, second] = &pair;
        self.update.apply(value, first, second);
        Ok(())
    }
}

impl InplaceOp2 for OffloadedStep<'_> {
    fn name(&self) -> &'static str {
        "adamw-offloaded"
    }

    fn cpu_fwd(&self, value: &mut CpuStorage, lx: &Layout, gradient: &CpuStorage, lg: &Layout) -> Result<()> {
        let (value, gradient) = (floats_mut(value, lx)?, floats(gradient, lg)?);
        let chunks = value.par_chunks_mut(CHUNK).zip(gradient.par_chunks(CHUNK)).enumerate();
        chunks
            .try_for_each(|(chunk, (value, gradient))| self.chunk(chunk * CHUNK, value, gradient))
            .map_err(candle_core::Error::wrap)
    }
}

/// A moment that is written.
enum Moment<'a> {
    Tensor(&'a Tensor),
    InFile {
        file: &'a ScratchFile,
        place: &'a Place,
        which: usize,
        /// Why it could not be read.
        failed: &'a RefCell<Option<String>>,
    },
}

impl View for Moment<'_> {
    fn dtype(&self) -> Dtype {
        Dtype::F32
    }

    fn shape(&self) -> &[usize] {
        match self {
            Self::Tensor(tensor) => tensor.dims(),
            Self::InFile { place, .. } => place.shape.dims(),
        }
    }

    fn data(&self) -> Cow<'_, [u8]> {
        match self {
            Self::Tensor(tensor) => View::data(*tensor),
            Self::InFile { file, place, which, failed } => {
                let mut bytes = vec![0; View::data_len(self)];
                if let Err(error) = file.read(place.of(*which), &mut bytes) {
                    failed.borrow_mut().get_or_insert(error.to_string());
                }
                Cow::Owned(bytes)
            }
        }
    }

    fn data_len(&self) -> usize {
        match self {
            Self::Tensor(tensor) => tensor.elem_count() * size_of::<f32>(),
            Self::InFile { place, .. } => place.shape.elem_count() * size_of::<f32>(),
        }
    }
}
