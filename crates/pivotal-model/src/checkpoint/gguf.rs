//! The GGUF container, versions 2 and 3: metadata and tensors, borrowed from the bytes.
//!
//! Format: ggml, `docs/gguf.md`. Every length is compared with the bytes that are left before it is used.

use std::collections::BTreeMap;
use std::path::Path;

use super::quantized::{STORAGES, Storage};
use crate::error::{Error, GgufFault, Result};

const DEFAULT_ALIGNMENT: u64 = 32;
/// ggml's `GGML_MAX_DIMS`.
const MAX_DIMENSIONS: u32 = 4;

/// A parsed GGUF file.
#[derive(Debug)]
pub(super) struct Gguf<'a> {
    pub(super) metadata: BTreeMap<&'a str, Value<'a>>,
    pub(super) tensors: BTreeMap<&'a str, Tensor<'a>>,
}

/// One metadata value; numeric arrays stay bytes until they are asked for.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Value<'a> {
    Unsigned(u64),
    Signed(i64),
    Float(f64),
    Bool(bool),
    Text(&'a str),
    Texts(Vec<&'a str>),
    Numbers(Number, &'a [u8]),
}

/// The fixed-size value types, by their numbers in the format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Number {
    U8 = 0,
    I8 = 1,
    U16 = 2,
    I16 = 3,
    U32 = 4,
    I32 = 5,
    F32 = 6,
    Bool = 7,
    U64 = 10,
    I64 = 11,
    F64 = 12,
}

const TEXT: u32 = 8;
const ARRAY: u32 = 9;

/// One tensor; `shape` in Hugging Face's order, slowest first.
#[derive(Debug)]
pub(super) struct Tensor<'a> {
    pub(super) shape: Vec<usize>,
    pub(super) storage: Storage,
    pub(super) data: &'a [u8],
}

/// A tensor's header, before the data's place is known.
struct Header<'a> {
    name: &'a str,
    shape: Vec<usize>,
    storage: Storage,
    offset: u64,
    bytes: u64,
}

impl Number {
    fn from_number(number: u32) -> Option<Self> {
        Some(match number {
            0 => Self::U8,
            1 => Self::I8,
            2 => Self::U16,
            3 => Self::I16,
            4 => Self::U32,
            5 => Self::I32,
            6 => Self::F32,
            7 => Self::Bool,
            10 => Self::U64,
            11 => Self::I64,
            12 => Self::F64,
            _ => return None,
        })
    }

    fn bytes(self) -> usize {
        match self {
            Self::U8 | Self::I8 | Self::Bool => 1,
            Self::U16 | Self::I16 => 2,
            Self::U32 | Self::I32 | Self::F32 => 4,
            Self::U64 | Self::I64 | Self::F64 => 8,
        }
    }

    /// The value in `bytes`, of which there are as many as [`Number::bytes`] says.
    fn read<'a>(self, bytes: &[u8]) -> Value<'a> {
        let mut wide = [0; 8];
        wide[..bytes.len()].copy_from_slice(bytes);
        let bits = u64::from_le_bytes(wide);
        let unused = 64 - 8 * bytes.len() as u32;
        match self {
            Self::U8 | Self::U16 | Self::U32 | Self::U64 => Value::Unsigned(bits),
            Self::I8 | Self::I16 | Self::I32 | Self::I64 => {
                Value::Signed(bits.cast_signed() << unused >> unused)
            }
            Self::F32 => Value::Float(shortest(f32::from_bits(bits as u32))),
            Self::F64 => Value::Float(f64::from_bits(bits)),
            Self::Bool => Value::Bool(bits != 0),
        }
    }
}

/// The f64 that prints as `number` does: the 1e-5 that a config meant, not its nearest f32.
fn shortest(number: f32) -> f64 {
    number.to_string().parse().unwrap_or(f64::from(number))
}

impl<'a> Value<'a> {
    /// The whole number in it, if it is one and not negative.
    pub(super) fn size(&self) -> Option<u64> {
        match *self {
            Self::Unsigned(number) => Some(number),
            Self::Signed(number) => number.try_into().ok(),
            _ => None,
        }
    }

    /// The elements of a numeric array.
    pub(super) fn elements(&self) -> Option<impl Iterator<Item = Value<'a>> + use<'a>> {
        match *self {
            Self::Numbers(number, bytes) => Some(
                bytes
                    .chunks_exact(number.bytes())
                    .map(move |bytes| number.read(bytes)),
            ),
            _ => None,
        }
    }

    /// A short name for messages.
    pub(super) fn describe(&self) -> String {
        match self {
            Self::Unsigned(number) => number.to_string(),
            Self::Signed(number) => number.to_string(),
            Self::Float(number) => number.to_string(),
            Self::Bool(flag) => flag.to_string(),
            Self::Text(text) => format!("{text:?}"),
            Self::Texts(texts) => format!("an array of {} strings", texts.len()),
            Self::Numbers(number, bytes) => {
                format!("an array of {} numbers", bytes.len() / number.bytes())
            }
        }
    }
}

impl<'a> Gguf<'a> {
    /// Parses a whole file; `path` is only for messages.
    pub(super) fn parse(bytes: &'a [u8], path: &'a Path) -> Result<Self> {
        let mut reader = Reader { bytes, at: 0, path };
        if reader.take(4, "the magic")? != b"GGUF" {
            return Err(reader.fault(GgufFault::Magic));
        }
        let version = reader.u32("the version")?;
        if !(2..=3).contains(&version) {
            return Err(reader.fault(GgufFault::Version(version)));
        }
        let tensor_count = reader.u64("the tensor count")?;
        let key_count = reader.u64("the metadata count")?;

        let mut metadata = BTreeMap::new();
        for _ in 0..key_count {
            let key = reader.text("a metadata key")?;
            let value = reader.value(key)?;
            if metadata.insert(key, value).is_some() {
                return Err(reader.fault(GgufFault::Duplicate(key.into())));
            }
        }
        // Not reserved from `tensor_count`: each header that exists has paid for itself in bytes.
        let mut headers = Vec::new();
        for _ in 0..tensor_count {
            headers.push(reader.tensor_header()?);
        }
        let alignment = match metadata.get("general.alignment") {
            Some(value) => value.size().unwrap_or(0),
            None => DEFAULT_ALIGNMENT,
        };
        if !alignment.is_power_of_two() || !(8..=65536).contains(&alignment) {
            return Err(reader.fault(GgufFault::Alignment(alignment)));
        }
        let start = reader.at.next_multiple_of(alignment as usize);
        let data = bytes.get(start..).unwrap_or_default();
        let tensors = reader.place(headers, data, alignment)?;
        Ok(Self { metadata, tensors })
    }
}

/// Where a parser stands in the bytes.
struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
    path: &'a Path,
}

impl<'a> Reader<'a> {
    fn fault(&self, fault: GgufFault) -> Error {
        Error::Gguf {
            path: self.path.into(),
            offset: self.at,
            fault,
        }
    }

    /// The next `count` bytes, if they are there.
    fn take(&mut self, count: u64, what: &'static str) -> Result<&'a [u8]> {
        let left = &self.bytes[self.at..];
        match usize::try_from(count)
            .ok()
            .and_then(|count| left.get(..count))
        {
            Some(taken) => {
                self.at += taken.len();
                Ok(taken)
            }
            None => Err(self.fault(GgufFault::Truncated {
                what,
                needed: count,
                left: left.len(),
            })),
        }
    }

    fn array<const N: usize>(&mut self, what: &'static str) -> Result<[u8; N]> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N as u64, what)?);
        Ok(array)
    }

    fn u32(&mut self, what: &'static str) -> Result<u32> {
        self.array(what).map(u32::from_le_bytes)
    }

    fn u64(&mut self, what: &'static str) -> Result<u64> {
        self.array(what).map(u64::from_le_bytes)
    }

    fn text(&mut self, what: &'static str) -> Result<&'a str> {
        let length = self.u64(what)?;
        let bytes = self.take(length, what)?;
        std::str::from_utf8(bytes).map_err(|_| self.fault(GgufFault::Utf8(what)))
    }

    fn value(&mut self, key: &str) -> Result<Value<'a>> {
        let found = self.u32("a value type")?;
        match found {
            TEXT => Ok(Value::Text(self.text("a string")?)),
            ARRAY => self.array_value(key),
            _ => {
                let number = self.number(found, key)?;
                let bytes = self.take(number.bytes() as u64, "a value")?;
                if number == Number::Bool && bytes[0] > 1 {
                    return Err(self.fault(GgufFault::Boolean {
                        key: key.into(),
                        found: bytes[0],
                    }));
                }
                Ok(number.read(bytes))
            }
        }
    }

    fn number(&self, found: u32, key: &str) -> Result<Number> {
        Number::from_number(found).ok_or_else(|| {
            self.fault(GgufFault::ValueType {
                key: key.into(),
                found,
            })
        })
    }

    fn array_value(&mut self, key: &str) -> Result<Value<'a>> {
        let kind = self.u32("an array's type")?;
        let count = self.u64("an array's length")?;
        match kind {
            ARRAY => Err(self.fault(GgufFault::NestedArray(key.into()))),
            TEXT => {
                let left = self.bytes.len() - self.at;
                // Each string has at least its length of eight bytes.
                let needed = count.saturating_mul(8);
                if needed > left as u64 {
                    return Err(self.fault(GgufFault::Truncated {
                        what: "an array of strings",
                        needed,
                        left,
                    }));
                }
                let texts = (0..count).map(|_| self.text("a string in an array"));
                Ok(Value::Texts(texts.collect::<Result<_>>()?))
            }
            _ => {
                let number = self.number(kind, key)?;
                let bytes = count.saturating_mul(number.bytes() as u64);
                Ok(Value::Numbers(number, self.take(bytes, "an array")?))
            }
        }
    }

    fn tensor_header(&mut self) -> Result<Header<'a>> {
        let name = self.text("a tensor's name")?;
        let dimensions = self.u32("a tensor's dimension count")?;
        if dimensions > MAX_DIMENSIONS {
            return Err(self.fault(GgufFault::Dimensions(name.into())));
        }
        let mut shape = Vec::with_capacity(dimensions as usize);
        let mut elements = 1usize;
        for _ in 0..dimensions {
            let size = self.u64("a tensor's dimension")?;
            let product = usize::try_from(size)
                .ok()
                .filter(|&size| size > 0)
                .and_then(|size| Some((size, elements.checked_mul(size)?)));
            let Some((size, product)) = product else {
                return Err(self.fault(GgufFault::Dimensions(name.into())));
            };
            shape.push(size);
            elements = product;
        }
        let number = self.u32("a tensor's type")?;
        let storage = Storage::from_number(number).ok_or_else(|| Error::TensorType {
            path: self.path.into(),
            tensor: name.into(),
            found: format!("number {number}"),
            expected: STORAGES,
        })?;
        let (block, block_bytes) = storage.block();
        // GGUF counts the fastest dimension first.
        let row = shape.first().copied().unwrap_or(1);
        if !row.is_multiple_of(block) {
            return Err(self.fault(GgufFault::Block {
                tensor: name.into(),
                row,
                block,
            }));
        }
        shape.reverse();
        Ok(Header {
            name,
            shape,
            storage,
            offset: self.u64("a tensor's offset")?,
            // Saturated, it lies outside every file.
            bytes: ((elements / block) as u64).saturating_mul(block_bytes as u64),
        })
    }

    /// Finds each tensor's bytes in the data: aligned, inside, and no two over each other.
    fn place(
        &self,
        mut headers: Vec<Header<'a>>,
        data: &'a [u8],
        alignment: u64,
    ) -> Result<BTreeMap<&'a str, Tensor<'a>>> {
        headers.sort_by_key(|header| header.offset);
        for pair in headers.windows(2) {
            // Cannot overflow unless the first lies outside the file, which is reported below.
            if pair[0].offset.saturating_add(pair[0].bytes) > pair[1].offset {
                let names = (pair[0].name.into(), pair[1].name.into());
                return Err(self.fault(GgufFault::Overlap(names.0, names.1)));
            }
        }
        let mut tensors = BTreeMap::new();
        for header in headers {
            let end = header.offset.checked_add(header.bytes);
            let range = usize::try_from(header.offset)
                .ok()
                .zip(end.and_then(|end| usize::try_from(end).ok()));
            let bytes = range
                .filter(|_| header.offset.is_multiple_of(alignment))
                .and_then(|(start, end)| data.get(start..end));
            let Some(bytes) = bytes else {
                return Err(self.fault(GgufFault::Offset {
                    tensor: header.name.into(),
                    at: header.offset,
                    length: header.bytes,
                    data: data.len(),
                }));
            };
            let tensor = Tensor {
                shape: header.shape,
                storage: header.storage,
                data: bytes,
            };
            if tensors.insert(header.name, tensor).is_some() {
                return Err(self.fault(GgufFault::Duplicate(header.name.into())));
            }
        }
        Ok(tensors)
    }
}
