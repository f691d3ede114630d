//! The files of a policy folder: read in a fixed order, bounded, with a revision and a fingerprint.
//!
//! What belongs to a bundle: `*.rego` and `*.json` in the folder and the folders in it. What does not: names that begin
//! with a dot (a Kubernetes ConfigMap keeps its files twice, once under `..data`), folders called `examples`, and
//! linked folders. Files are followed where they are links. A `.json` file is data at the path of its folder, as
//! `opa eval -d` has it: `behavry/models.json` is `data.behavry`.

use std::fmt;
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

/// Folders that are not loaded, so that the folder this project ships can be loaded as it is.
const EXAMPLES: &str = "examples";

const MAX_FILE_BYTES: u64 = 1 << 20;
const MAX_TOTAL_BYTES: u64 = 16 << 20;
const MAX_FILES: usize = 512;
const MAX_ENTRIES: usize = 8192;
const MAX_DEPTH: usize = 8;

/// Why a folder is not a policy. The proxy does not start with such a folder; while it runs, the last good one stays.
#[derive(Debug)]
pub enum LoadError {
    /// The folder or a file of it cannot be read.
    Unreadable { path: PathBuf, cause: io::Error },
    /// The folder has no `.rego` file but tests.
    Empty { dir: PathBuf },
    /// Larger than any policy should be.
    TooLarge { path: PathBuf, limit: String },
    /// One file is wrong. `problem` says what to do.
    File { file: String, line: Option<u32>, problem: String },
    /// No file declares a rule that decides: everything would pass.
    NothingDecides,
}

impl fmt::Display for LoadError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            LoadError::Unreadable { path, cause } => write!(f, "cannot read {}: {cause}", path.display()),
            LoadError::Empty { dir } => write!(
                f,
                "{} has no policy: no file ends in .rego (tests, names with a dot in front and folders called \
                 `{EXAMPLES}` do not count)",
                dir.display()
            ),
            LoadError::TooLarge { path, limit } => write!(f, "{}: more than {limit}", path.display()),
            LoadError::File { file, line: Some(line), problem } => write!(f, "{file}:{line}: {problem}"),
            LoadError::File { file, line: None, problem } => write!(f, "{file}: {problem}"),
            LoadError::NothingDecides => f.write_str(
                "no file declares `allow`, `deny`, `escalate` or `decision` in `package behavry.authz`: everything \
                 would be allowed",
            ),
        }
    }
}

impl std::error::Error for LoadError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            LoadError::Unreadable { cause, .. } => Some(cause),
            _ => None,
        }
    }
}

/// One file, by its path inside the folder, with `/` between names.
#[derive(Debug, PartialEq, Eq)]
pub struct SourceFile {
    pub name: String,
    pub text: String,
}

/// The files of a policy, each group sorted by name.
#[derive(Debug, Default)]
pub struct Bundle {
    pub rego: Vec<SourceFile>,
    pub tests: Vec<SourceFile>,
    pub data: Vec<SourceFile>,
    /// YAML is data in OPA, and is not read here.
    pub unread: Vec<String>,
}

/// Changes when a file of the folder may have changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fingerprint(u64);

/// A cheap look at a folder: names, sizes, times and inodes of its files, none of which is opened. Take it *before*
/// loading, so that a change in between is seen the next time.
pub fn fingerprint(dir: &Path) -> Result<Fingerprint, LoadError> {
    let mut hasher = DefaultHasher::new();
    for Entry { name, path, role } in entries(dir)? {
        if role == Role::Test {
            continue;
        }
        let meta = fs::metadata(&path).map_err(|cause| LoadError::Unreadable { path, cause })?;
        (name, meta.len(), meta.modified().ok()).hash(&mut hasher);
        #[cfg(unix)]
        {
            use std::os::unix::fs::MetadataExt;
            (meta.ino(), meta.ctime(), meta.ctime_nsec()).hash(&mut hasher);
        }
    }
    Ok(Fingerprint(hasher.finish()))
}

impl Bundle {
    pub fn read(dir: &Path) -> Result<Bundle, LoadError> {
        let mut bundle = Bundle::default();
        let mut total_bytes = 0;
        for Entry { name, path, role } in entries(dir)? {
            if role == Role::Unread {
                bundle.unread.push(name);
                continue;
            }
            let text = read_text(&name, &path)?;
            total_bytes += text.len() as u64;
            if total_bytes > MAX_TOTAL_BYTES {
                return Err(LoadError::TooLarge { path: dir.to_owned(), limit: format!("{MAX_TOTAL_BYTES} bytes") });
            }
            bundle.push(SourceFile { name, text }, role);
        }
        if bundle.rego.is_empty() {
            return Err(LoadError::Empty { dir: dir.to_owned() });
        }
        Ok(bundle)
    }

    pub fn from_sources(files: &[(&str, &str)]) -> Result<Bundle, LoadError> {
        let mut bundle = Bundle::default();
        let mut files = files.to_vec();
        files.sort_unstable();
        for (name, text) in files {
            if let Some(role) = Role::of(name) {
                bundle.push(SourceFile { name: name.to_owned(), text: text.to_owned() }, role);
            }
        }
        if bundle.rego.is_empty() {
            return Err(LoadError::Empty { dir: PathBuf::from("the policy") });
        }
        Ok(bundle)
    }

    /// First 12 hex digits of SHA-256 over what decides: names, lengths and texts of rules and data, not of tests.
    pub fn revision(&self) -> String {
        let mut hash = Sha256::new();
        for file in self.rego.iter().chain(&self.data) {
            for part in [&file.name, &file.text] {
                hash.update((part.len() as u64).to_be_bytes());
                hash.update(part.as_bytes());
            }
        }
        hash.finalize().iter().take(6).map(|byte| format!("{byte:02x}")).collect()
    }

    fn push(&mut self, file: SourceFile, role: Role) {
        match role {
            Role::Rego => self.rego.push(file),
            Role::Test => self.tests.push(file),
            Role::Data => self.data.push(file),
            Role::Unread => self.unread.push(file.name),
        }
    }
}

struct Entry {
    name: String,
    path: PathBuf,
    role: Role,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Role {
    Rego,
    Test,
    Data,
    Unread,
}

impl Role {
    fn of(name: &str) -> Option<Role> {
        match name.rsplit_once('.')? {
            (stem, "rego") if stem.ends_with("_test") => Some(Role::Test),
            (_, "rego") => Some(Role::Rego),
            (_, "json") => Some(Role::Data),
            (_, "yaml" | "yml") => Some(Role::Unread),
            _ => None,
        }
    }
}

/// What belongs to a bundle, sorted by name.
fn entries(dir: &Path) -> Result<Vec<Entry>, LoadError> {
    let mut found = Vec::new();
    let mut seen = 0;
    let mut folders = vec![(dir.to_owned(), String::new(), 0)];
    while let Some((folder, prefix, depth)) = folders.pop() {
        let unreadable = |cause| LoadError::Unreadable { path: folder.clone(), cause };
        for entry in fs::read_dir(&folder).map_err(unreadable)? {
            let entry = entry.map_err(unreadable)?;
            seen += 1;
            if seen > MAX_ENTRIES {
                return Err(LoadError::TooLarge { path: dir.to_owned(), limit: format!("{MAX_ENTRIES} files") });
            }
            let Some(name) = entry.file_name().to_str().map(str::to_owned) else { continue };
            if name.starts_with('.') {
                continue;
            }
            let path = entry.path();
            let is_folder =
                entry.file_type().map_err(|cause| LoadError::Unreadable { path: path.clone(), cause })?.is_dir();
            if is_folder {
                if name == EXAMPLES {
                    continue;
                }
                if depth == MAX_DEPTH {
                    return Err(LoadError::TooLarge { path, limit: format!("{MAX_DEPTH} folders deep") });
                }
                folders.push((path, format!("{prefix}{name}/"), depth + 1));
            } else if let Some(role) = Role::of(&name) {
                // Follows links. What is not a regular file (a pipe would never end) is no part of a policy.
                let meta = fs::metadata(&path).map_err(|cause| LoadError::Unreadable { path: path.clone(), cause })?;
                if meta.is_file() {
                    found.push(Entry { name: format!("{prefix}{name}"), path, role });
                }
            }
            if found.len() > MAX_FILES {
                return Err(LoadError::TooLarge { path: dir.to_owned(), limit: format!("{MAX_FILES} policy files") });
            }
        }
    }
    found.sort_unstable_by(|a, b| a.name.cmp(&b.name));
    Ok(found)
}

fn read_text(name: &str, path: &Path) -> Result<String, LoadError> {
    let unreadable = |cause| LoadError::Unreadable { path: path.to_owned(), cause };
    let mut bytes = Vec::new();
    fs::File::open(path).map_err(unreadable)?.take(MAX_FILE_BYTES + 1).read_to_end(&mut bytes).map_err(unreadable)?;
    if bytes.len() as u64 > MAX_FILE_BYTES {
        return Err(LoadError::TooLarge { path: path.to_owned(), limit: format!("{MAX_FILE_BYTES} bytes") });
    }
    String::from_utf8(bytes).map_err(|error| {
        let good = &error.as_bytes()[..error.utf8_error().valid_up_to()];
        let line = good.iter().filter(|byte| **byte == b'\n').count() as u32 + 1;
        LoadError::File { file: name.to_owned(), line: Some(line), problem: "not UTF-8 text".to_owned() }
    })
}
