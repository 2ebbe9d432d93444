//! Weights in safetensors files, one or many, read through memory maps.
//!
//! The `safetensors` crate checks the header against the file's length before it allocates, and that the tensors tile
//! the data without gap or overlap.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use pivotal_core::{ContentHasher, FileError, read_file};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;

use super::map::{MappedFile, map_file};
use super::quantized::Storage;
use super::stored::Stored;
use super::{HostTensor, names_to_read, read_optional};
use crate::config::DecoderConfig;
use crate::error::{Error, Result};

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
/// Bytes of a file that are hashed at a time.
const HASHED_BYTES: usize = 64 << 20;

/// A file of tensors.
struct Opened {
    path: PathBuf,
    map: MappedFile,
}

/// Reads every weight that `config` asks for from a Hugging Face directory.
pub(super) fn read_weights(
    directory: &Path,
    config: &DecoderConfig,
) -> Result<BTreeMap<String, HostTensor>> {
    let files = weight_files(directory)?;
    let maps = open(files.keys())?;
    let opened = parse(&maps)?;
    for ((file, tensors), named) in opened.iter().zip(files.values()) {
        let held: BTreeSet<&str> = tensors.names().into_iter().collect();
        let missing: Vec<String> = named
            .iter()
            .filter(|name| !held.contains(name.as_str()))
            .cloned()
            .collect();
        if !missing.is_empty() {
            return Err(Error::MissingTensors {
                path: file.path.clone(),
                names: missing,
            });
        }
    }
    let views = collect(&opened)?;
    let shapes = views
        .iter()
        .map(|(name, found)| (name.clone(), found.view.shape().to_vec()))
        .collect();
    names_to_read(directory, config, &shapes)?
        .into_iter()
        .map(|name| {
            let tensor = to_host(&name, &views[&name])?;
            Ok((name, tensor))
        })
        .collect()
}

/// Reads every tensor of one file.
pub(crate) fn read_all(path: &Path) -> Result<BTreeMap<String, HostTensor>> {
    let maps = open([path])?;
    let opened = parse(&maps)?;
    collect(&opened)?
        .into_iter()
        .map(|(name, found)| {
            let mut tensor = to_host(&name, &found)?;
            tensor.leave_file();
            Ok((name, tensor))
        })
        .collect()
}

/// Reads every tensor of one safetensors file as `f32`: a trainer's own state, say. A `<file>.blake3` beside it is checked.
///
/// # Errors
/// [`Error::File`], [`Error::Safetensors`], or [`Error::TensorType`] for a tensor that is not F32, F16 or BF16.
pub fn read_tensors(path: &Path) -> Result<BTreeMap<String, HostTensor>> {
    read_all(path)
}

/// The bytes of a safetensors file with these tensors as `f32`: equal tensors give equal bytes.
///
/// # Errors
/// [`Error::Safetensors`] if they do not fit the format.
pub fn tensors_to_bytes(tensors: &BTreeMap<String, HostTensor>) -> Result<Vec<u8>> {
    serialize(tensors.iter().map(|(name, tensor)| (name.as_str(), tensor))).map_err(|source| {
        Error::Safetensors {
            path: "the tensors".into(),
            source,
        }
    })
}

/// The bytes of a safetensors file with these tensors, as `f32` and marked as PyTorch's.
pub(crate) fn serialize<'a>(
    tensors: impl Iterator<Item = (&'a str, &'a HostTensor)>,
) -> Result<Vec<u8>, safetensors::SafeTensorError> {
    let bytes: Vec<(&str, &[usize], Vec<u8>)> = tensors
        .map(|(name, tensor)| {
            let bytes = tensor.values().iter().flat_map(|value| value.to_le_bytes());
            (name, tensor.shape(), bytes.collect())
        })
        .collect();
    let views = bytes
        .iter()
        .map(|(name, shape, bytes)| {
            Ok((*name, TensorView::new(Dtype::F32, shape.to_vec(), bytes)?))
        })
        .collect::<Result<Vec<_>, safetensors::SafeTensorError>>()?;
    // One entry only: the crate writes this map in hash order, and equal models must be equal files.
    let metadata = [("format".to_owned(), "pt".to_owned())];
    safetensors::serialize(views, Some(metadata.into()))
}

/// The files that hold the weights, each with the tensors that an index says are in it.
fn weight_files(directory: &Path) -> Result<BTreeMap<PathBuf, BTreeSet<String>>> {
    let single = directory.join(SINGLE);
    if single.is_file() {
        return Ok(BTreeMap::from([(single, BTreeSet::new())]));
    }
    let index_path = directory.join(INDEX);
    let Some(bytes) = read_optional(&index_path)? else {
        return Err(Error::NoWeights {
            path: directory.into(),
        });
    };
    let index: Value = serde_json::from_slice(&bytes).map_err(|source| Error::Json {
        path: index_path.clone(),
        source,
    })?;
    let Some(Value::Object(weight_map)) = index.get("weight_map") else {
        return Err(Error::MissingKey {
            path: index_path,
            key: "weight_map".into(),
        });
    };
    let mut files = BTreeMap::<_, BTreeSet<String>>::new();
    for (tensor, file) in weight_map {
        let file = file
            .as_str()
            .filter(|file| is_plain_name(file))
            .ok_or_else(|| {
                Error::value(
                    &index_path,
                    &format!("weight_map.{tensor}"),
                    "the name of a file in the same directory",
                    file,
                )
            })?;
        files
            .entry(directory.join(file))
            .or_default()
            .insert(tensor.clone());
    }
    Ok(files)
}

/// A name without a way out of its directory.
fn is_plain_name(name: &str) -> bool {
    let mut parts = Path::new(name).components();
    matches!(parts.next(), Some(std::path::Component::Normal(_))) && parts.next().is_none()
}

/// Maps files, and compares each with the checksum beside it where there is one.
fn open(paths: impl IntoIterator<Item = impl AsRef<Path>>) -> Result<Vec<Opened>> {
    paths
        .into_iter()
        .map(|path| {
            let path = path.as_ref().to_path_buf();
            let map = map_file(&path)?;
            let mut name = path.file_name().unwrap_or_default().to_owned();
            name.push(".blake3");
            let checksum = path.with_file_name(name);
            if checksum.is_file() {
                let expected = String::from_utf8_lossy(&read_file(&checksum)?)
                    .trim()
                    .to_owned();
                let found = hash(&map);
                if found != expected {
                    return Err(Error::File(FileError::Damaged {
                        path,
                        expected,
                        found,
                    }));
                }
            }
            Ok(Opened { path, map })
        })
        .collect()
}

/// The hash of a file, of which no more than a piece is in memory at a time.
fn hash(map: &MappedFile) -> String {
    let mut hasher = ContentHasher::default();
    for start in (0..map.len()).step_by(HASHED_BYTES) {
        let piece = start..(start + HASHED_BYTES).min(map.len());
        hasher.update(&map[piece.clone()]);
        map.forget(piece);
    }
    hasher.finish()
}

fn parse(maps: &[Opened]) -> Result<Vec<(&Opened, SafeTensors<'_>)>> {
    maps.iter()
        .map(|opened| {
            let tensors =
                SafeTensors::deserialize(&opened.map).map_err(|source| Error::Safetensors {
                    path: opened.path.clone(),
                    source,
                })?;
            Ok((opened, tensors))
        })
        .collect()
}

/// A tensor, and the file that it is in.
struct Found<'a> {
    file: &'a Opened,
    view: TensorView<'a>,
}

fn collect<'a>(files: &[(&'a Opened, SafeTensors<'a>)]) -> Result<BTreeMap<String, Found<'a>>> {
    let mut views = BTreeMap::new();
    for (file, tensors) in files {
        for (name, view) in tensors.tensors() {
            if views.insert(name.clone(), Found { file, view }).is_some() {
                return Err(Error::DuplicateTensor {
                    path: file.path.clone(),
                    tensor: name,
                });
            }
        }
    }
    Ok(views)
}

fn to_host(name: &str, Found { file, view }: &Found<'_>) -> Result<HostTensor> {
    let storage = match view.dtype() {
        Dtype::F32 => Storage::F32,
        Dtype::F16 => Storage::F16,
        Dtype::BF16 => Storage::Bf16,
        other => {
            return Err(Error::TensorType {
                path: file.path.clone(),
                tensor: name.into(),
                found: format!("{other:?}"),
                expected: "F32, F16, BF16",
            });
        }
    };
    let stored = Stored::new(&file.map, view.data(), storage);
    HostTensor::stored(view.shape().to_vec(), stored)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tensors_of_a_file_do_not_change_with_it() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("x.safetensors");
        let tensors = |value| {
            let tensor = HostTensor::new(vec![2], vec![value; 2]).unwrap();
            BTreeMap::from([("w".to_owned(), tensor)])
        };
        std::fs::write(&path, tensors_to_bytes(&tensors(1.0)).unwrap()).unwrap();
        let read = read_tensors(&path).unwrap();
        // In place: another program's way of writing.
        std::fs::write(&path, tensors_to_bytes(&tensors(2.0)).unwrap()).unwrap();
        assert_eq!(read, tensors(1.0));
    }

    #[test]
    fn the_three_types_read_by_hand() {
        let header = r#"{"b":{"dtype":"BF16","shape":[3],"data_offsets":[0,6]},"f":{"dtype":"F16","shape":[3],"data_offsets":[6,12]},"w":{"dtype":"F32","shape":[1,1],"data_offsets":[12,16]}}"#;
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.as_bytes());
        // 1, -2 and 0.10009765625 in bf16; 1, -2 and 2^-24 in f16.
        for half in [0x3F80u16, 0xC000, 0x3DCD, 0x3C00, 0xC000, 0x0001] {
            bytes.extend(half.to_le_bytes());
        }
        bytes.extend((-0.0f32).to_le_bytes());
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("x.safetensors");
        std::fs::write(&path, bytes).unwrap();
        let tensors = read_all(&path).unwrap();
        assert_eq!(tensors["b"].values(), [1.0, -2.0, 0.100_097_656]);
        assert_eq!(tensors["f"].values(), [1.0, -2.0, 2.0f32.powi(-24)]);
        assert_eq!(tensors["w"].values()[0].to_bits(), 1 << 31);
        assert_eq!(tensors["w"].shape(), [1, 1]);
    }
}
