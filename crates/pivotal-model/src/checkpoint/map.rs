//! The crate's one memory map.

use std::fs::File;
use std::path::Path;

use memmap2::Mmap;

use crate::error::{Error, Result};

/// Maps a whole file into memory, to read.
#[allow(unsafe_code)]
pub(crate) fn map_file(path: &Path) -> Result<Mmap> {
    let file = File::open(path).map_err(|source| Error::read(path, source))?;
    // SAFETY: the map is private to this crate, read-only, and dropped when the loader that made it returns. Pivotal
    // never writes to a model file in place (every write is a rename), so its own processes cannot change these bytes;
    // another program that truncates the file meanwhile ends this one by signal, as with every mapped file.
    unsafe { Mmap::map(&file) }.map_err(|source| Error::read(path, source))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_map_has_the_files_bytes_and_survives_its_removal() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("weights");
        std::fs::write(&path, b"pivotal").unwrap();
        let map = map_file(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        assert_eq!(&map[..], b"pivotal");
        assert!(map_file(&path).is_err());
        std::fs::write(&path, b"").unwrap();
        assert!(map_file(&path).unwrap().is_empty());
    }
}
