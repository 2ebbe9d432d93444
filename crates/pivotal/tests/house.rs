//! The house rules that a compiler does not hold us to: which crate may use which, how long a file may be, where `unsafe`
//! may stand, and that one build of the dependencies serves the program and its tests.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

/// Which of our crates each may use, for itself and for its tests (ARCHITECTURE.md). A crate that is not here may not exist.
const ARROWS: [(&str, &[&str]); 11] = [
    ("pivotal-core", &[]),
    ("pivotal-credit", &["core"]),
    ("pivotal-data", &["core"]),
    ("pivotal-kernels", &[]),
    ("pivotal-ops", &["kernels"]),
    ("pivotal-loss", &["core"]),
    ("pivotal-model", &["core", "kernels", "ops"]),
    (
        "pivotal-train",
        &["core", "credit", "data", "kernels", "ops", "loss", "model"],
    ),
    (
        "pivotal-lab",
        &[
            "core", "credit", "data", "kernels", "ops", "loss", "model", "train", "report",
        ],
    ),
    ("pivotal-report", &["core"]),
    (
        "pivotal",
        &[
            "core", "credit", "data", "kernels", "ops", "loss", "model", "train", "lab", "report",
        ],
    ),
];

/// Where `unsafe` may stand outside `pivotal-kernels`: one memory map and one allocator.
const UNSAFE_FILES: [(&str, &str); 2] = [
    ("pivotal-model", "src/checkpoint/map.rs"),
    ("pivotal", "src/allocator.rs"),
];

const LONG_LINES: usize = 600;
const TOO_LONG_LINES: usize = 1000;
const REASON: &str = "// Long because";
const NAMELESS: [&str; 4] = ["utils", "helpers", "common", "prelude"];

#[test]
fn arrows_go_one_way() {
    let mut faults = Vec::new();
    for package in packages() {
        let from = text(&package["name"]);
        // What has a path is ours; a scratch crate that lies beside the workspace's own must not be used either.
        for dependency in package["dependencies"].as_array().expect("dependencies") {
            let to = text(&dependency["name"]);
            if dependency["path"].is_string() && !may_use(from, to) {
                faults.push(format!("`{from}` may not use `{to}`"));
            }
        }
        if !ARROWS.iter().any(|(known, _)| *known == from) {
            faults.push(format!("`{from}` is not in the table of crates"));
        }
    }
    none(&faults);
}

/// Points of the checklist in docs/details.md, each with tests that are named after it.
const DETAILS: usize = 34;

#[test]
fn every_detail_has_its_tests_and_the_table_names_them_all() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let mut there = BTreeSet::new();
    for source in sources() {
        let names = words(&source.text).map(|(_, word)| word);
        let numbered = |word: &&str| {
            let rest = word.strip_prefix("detail_");
            rest.is_some_and(|rest| rest.starts_with(|first: char| first.is_ascii_digit()))
        };
        there.extend(names.filter(numbered).map(str::to_owned));
    }
    let page = std::fs::read_to_string(root.join("docs/details.md")).expect("the page");
    let (_, table) = page.split_once("## Checklist").expect("the checklist");
    let names = table.split('`').filter(|name| name.starts_with("detail_"));
    let told: BTreeSet<String> = names.map(str::to_owned).collect();
    assert_eq!(told, there, "left: docs/details.md, right: the tests");
    for number in 1..=DETAILS {
        let row = format!("| {number:02} | ");
        let row = table.lines().find(|line| line.starts_with(&row));
        let name = format!("`detail_{number:02}_");
        assert!(row.is_some_and(|row| row.contains(&name)), "{name}");
    }
}

#[test]
fn crates_say_what_they_are() {
    let mut faults = Vec::new();
    for package in packages() {
        let name = text(&package["name"]);
        if package["description"].as_str().is_none_or(str::is_empty) {
            faults.push(format!("`{name}` has no description"));
        }
        if package["license"] != "Apache-2.0 OR MIT" {
            faults.push(format!("`{name}` is not licensed `Apache-2.0 OR MIT`"));
        }
        let directory = Path::new(text(&package["manifest_path"]))
            .parent()
            .expect("a directory");
        if directory.file_name().and_then(|name| name.to_str()) != Some(name) {
            faults.push(format!("`{name}` lies in `{}`", directory.display()));
        }
    }
    none(&faults);
}

#[test]
fn files_are_short_or_say_why_not() {
    let mut faults = Vec::new();
    for source in sources() {
        let lines = source.text.lines().count();
        let explained = source.text.lines().any(|line| {
            line.trim_start()
                .strip_prefix(REASON)
                .is_some_and(|reason| !reason.trim().is_empty())
        });
        if lines > TOO_LONG_LINES || (lines > LONG_LINES && !explained) {
            faults.push(format!(
                "{source} has {lines} lines: above {LONG_LINES} it needs a line `{REASON} …`, above {TOO_LONG_LINES} nothing helps"
            ));
        }
    }
    none(&faults);
}

#[test]
fn nothing_is_left_unfinished() {
    let mut faults = Vec::new();
    for source in sources() {
        let code = code_of(&source.text);
        for macro_name in ["todo", "unimplemented", "dbg"] {
            if words(&code)
                .any(|(at, word)| word == macro_name && code[at..].starts_with(&format!("{word}!")))
            {
                faults.push(format!("{source} has `{macro_name}!`"));
            }
        }
        let stem = source.path.file_stem().and_then(|stem| stem.to_str());
        let nameless = NAMELESS.iter().any(|name| Some(*name) == stem);
        if nameless && source.path.starts_with("src") {
            faults.push(format!("{source} is named for nothing"));
        }
    }
    none(&faults);
}

#[test]
fn a_library_root_only_lists() {
    let mut faults = Vec::new();
    for source in sources()
        .iter()
        .filter(|source| source.path == Path::new("src/lib.rs"))
    {
        for statement in statements(&code_of(&source.text)) {
            let listed = ["mod ", "pub mod ", "pub use ", "pub(crate) use "]
                .iter()
                .any(|start| statement.starts_with(start));
            if !listed || statement.contains("*") {
                faults.push(format!(
                    "{source} holds more than docs, modules and named re-exports: `{statement}`"
                ));
            }
        }
    }
    none(&faults);
}

#[test]
fn unsafe_has_its_rooms() {
    let mut faults = Vec::new();
    for source in sources()
        .iter()
        .filter(|source| source.package != "pivotal-kernels")
    {
        let allowed = UNSAFE_FILES
            .iter()
            .any(|(package, path)| source.package == *package && source.path == Path::new(path));
        if !allowed && words(&code_of(&source.text)).any(|(_, word)| word == "unsafe") {
            faults.push(format!("{source} has `unsafe`"));
        }
    }
    none(&faults);
}

/// Features that only tests turn on would have most dependencies built twice (docs/decisions/0002-one-release-build.md).
#[test]
fn tests_turn_on_no_feature_that_the_program_lacks() {
    let names: Vec<String> = packages()
        .iter()
        .map(|package| text(&package["name"]).to_owned())
        .collect();
    let all: Vec<&str> = names.iter().flat_map(|name| ["-p", name]).collect();
    let program = features(&["-p", "pivotal"], "normal,build");
    let tests = features(&all, "normal,build,dev");
    let differ = program
        .iter()
        .filter(|(package, features)| !features.is_subset(&tests[*package]));
    let faults: Vec<String> = differ
        .map(|(package, features)| {
            format!("`{package}` is built with {features:?} for the program and with {:?} for the tests", tests[package])
        })
        .collect();
    none(&faults);
}

#[test]
fn code_is_told_from_comments_and_texts() {
    let source = "let a = \"unsafe // {\"; // unsafe\nlet b = r#\"todo!(\"\")\"#; /* dbg!() /* */ */ let c = '\"'; f::<'a>(c);";
    let expected = "let a = ; \nlet b = ;  let c = ; f::<'a>(c);";
    assert_eq!(code_of(source), expected);
}

#[test]
fn the_rules_refuse_what_they_are_for() {
    assert!(may_use("pivotal-train", "pivotal-credit"));
    assert!(!may_use("pivotal-credit", "pivotal-train"));
    assert!(!may_use("pivotal-core", "pivotal-core"));
    assert!(!may_use("pivotal", "elsewhere"));
    let root = code_of(
        "#![doc = include_str!(\"x]\")]\nmod a;\n#[cfg(test)]\nmod b;\npub use a::{B, C};\nfn f() {}",
    );
    let found = statements(&root);
    assert_eq!(found, ["mod a", "mod b", "pub use a::{B, C}", "fn f() {}"]);
}

fn may_use(from: &str, to: &str) -> bool {
    let allowed = ARROWS.iter().find(|(package, _)| *package == from);
    let to = to.strip_prefix("pivotal-");
    allowed.is_some_and(|(_, allowed)| to.is_some_and(|to| allowed.contains(&to)))
}

fn none(faults: &[String]) {
    assert!(faults.is_empty(), "\n{}", faults.join("\n"));
}

fn text(value: &Value) -> &str {
    value.as_str().expect("a text in cargo's metadata")
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../..")
        .canonicalize()
        .expect("the workspace")
}

fn cargo(arguments: &[&str]) -> String {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(cargo)
        .args(arguments)
        .current_dir(root())
        .output()
        .expect("cargo runs");
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "cargo {arguments:?}: {errors}");
    String::from_utf8(output.stdout).expect("cargo writes UTF-8")
}

/// The workspace's own packages, as `cargo metadata` has them; read as JSON, for a crate that does it would turn on features
/// of its dependencies that the program does without.
fn packages() -> Vec<Value> {
    let json = cargo(&["metadata", "--no-deps", "--format-version", "1"]);
    let mut metadata: Value = serde_json::from_str(&json).expect("cargo writes JSON");
    let all = metadata["packages"].take();
    let Value::Array(all) = all else {
        panic!("`packages` is a list")
    };
    let ours: Vec<Value> = all
        .into_iter()
        .filter(|package| text(&package["name"]).starts_with("pivotal"))
        .collect();
    assert!(ours.iter().any(|package| package["name"] == "pivotal"));
    ours
}

/// Sets of features that each package is built with, by name and version.
fn features(selection: &[&str], edges: &str) -> BTreeMap<String, BTreeSet<String>> {
    let fixed = [
        "tree",
        "--offline",
        "--prefix",
        "none",
        "--format",
        "{p}|{f}",
        "--edges",
        edges,
    ];
    let tree = cargo(&[&fixed[..], selection].concat());
    let mut found = BTreeMap::<String, BTreeSet<String>>::new();
    for (package, features) in tree.lines().filter_map(|line| line.split_once('|')) {
        found
            .entry(package.to_owned())
            .or_default()
            .insert(features.trim_end_matches(" (*)").to_owned());
    }
    found
}

/// A source file of one of our packages; `path` is relative to the package.
struct Source {
    package: String,
    path: PathBuf,
    text: String,
}

impl std::fmt::Display for Source {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "`{}/{}`", self.package, self.path.display())
    }
}

fn sources() -> Vec<Source> {
    let mut sources = Vec::new();
    for package in packages() {
        let directory = Path::new(text(&package["manifest_path"]))
            .parent()
            .expect("a directory");
        let mut open = vec![directory.to_owned()];
        while let Some(next) = open.pop() {
            for entry in std::fs::read_dir(&next).expect("a readable directory") {
                let path = entry.expect("a readable entry").path();
                if path.is_dir() {
                    open.push(path);
                } else if path.extension().is_some_and(|extension| extension == "rs") {
                    sources.push(Source {
                        package: text(&package["name"]).to_owned(),
                        text: std::fs::read_to_string(&path).expect("a source in UTF-8"),
                        path: path
                            .strip_prefix(directory)
                            .expect("a path inside")
                            .to_owned(),
                    });
                }
            }
        }
    }
    assert!(
        sources.len() > 50,
        "the walk lost its way: {} files",
        sources.len()
    );
    sources
}

/// The source without comments, texts and characters.
fn code_of(source: &str) -> String {
    let mut code = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(first) = rest.chars().next() {
        let raw = rest
            .strip_prefix('r')
            .map(|after| after.len() - after.trim_start_matches('#').len());
        let skipped = if rest.starts_with("//") {
            rest.find('\n').unwrap_or(rest.len())
        } else if rest.starts_with("/*") {
            block_comment(rest)
        } else if first == '"' {
            quoted(rest, '"')
        } else if let Some(hashes) = raw.filter(|&hashes| {
            rest[1 + hashes..].starts_with('"')
                && !code.ends_with(|last: char| last.is_alphanumeric() || last == '_')
        }) {
            let end = format!("\"{}", "#".repeat(hashes));
            let start = hashes + 2;
            rest[start..]
                .find(&end)
                .map_or(rest.len(), |at| start + at + end.len())
        } else if first == '\'' && is_character(rest) {
            quoted(rest, '\'')
        } else {
            0
        };
        if skipped == 0 {
            code.push(first);
            rest = &rest[first.len_utf8()..];
        } else {
            rest = &rest[skipped..];
        }
    }
    code
}

/// A character, and not a lifetime.
fn is_character(rest: &str) -> bool {
    let mut after = rest.chars().skip(1);
    after.next() == Some('\\') || after.next() == Some('\'')
}

fn quoted(rest: &str, end: char) -> usize {
    let mut escaped = false;
    for (at, character) in rest.char_indices().skip(1) {
        match character {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            _ if character == end => return at + end.len_utf8(),
            _ => {}
        }
    }
    rest.len()
}

fn block_comment(rest: &str) -> usize {
    let (mut depth, mut at) = (0usize, 0);
    while at < rest.len() {
        let (step, change) = match &rest.as_bytes()[at..] {
            [b'/', b'*', ..] => (2, 1),
            [b'*', b'/', ..] => (2, -1),
            _ => (1, 0),
        };
        at += step;
        depth = depth.saturating_add_signed(change);
        if depth == 0 {
            break;
        }
    }
    at
}

/// The words of a piece of code, with where they stand.
fn words(code: &str) -> impl Iterator<Item = (usize, &str)> {
    let in_word = |character: char| character.is_alphanumeric() || character == '_';
    code.split(move |character| !in_word(character))
        .filter(|word| !word.is_empty())
        .map(|word| (word.as_ptr() as usize - code.as_ptr() as usize, word))
}

/// What a file says, without its attributes: modules, uses, and whatever else there is, on one line each.
fn statements(code: &str) -> Vec<String> {
    let mut plain = String::new();
    let mut rest = code.trim_start();
    while !rest.is_empty() {
        let attribute = rest.starts_with("#[") || rest.starts_with("#![");
        if attribute {
            rest = rest
                .find(']')
                .map_or("", |end| rest[end + 1..].trim_start());
            continue;
        }
        let end = rest.find(';').map_or(rest.len(), |end| end + 1);
        plain.push_str(&rest[..end]);
        rest = rest[end..].trim_start();
    }
    plain
        .split(';')
        .map(|statement| statement.split_whitespace().collect::<Vec<_>>().join(" "))
        .filter(|statement| !statement.is_empty())
        .collect()
}
