//! The structure of the sources: files import each other in one direction, without a circle.
//!
//! A file imports another if a `use` or a path in its code names something of it; unit tests are left out. A `mod.rs` (or `lib.rs`)
//! and the files below it are parts of one module: that the one hands on names of the others is not an import, but the others may
//! import from it.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use syn::visit::Visit;

/// Where the packages begin: each directory under `src` that has a manifest, and `src` itself.
fn packages(repository: &Path) -> Vec<PathBuf> {
    let src = repository.join("src");
    let below = fs::read_dir(&src).unwrap().map(|entry| entry.unwrap().path());
    let mut packages: Vec<_> = below.filter(|path| path.join("Cargo.toml").exists()).collect();
    assert!(packages.len() > 5, "{packages:?}");
    packages.push(src);
    packages
}

/// The files of a package, by the path of the module that each is.
type Modules = BTreeMap<Vec<String>, PathBuf>;

/// For each file, the files that it imports.
type Imports = BTreeMap<PathBuf, BTreeSet<PathBuf>>;

fn modules(root: &Path) -> Modules {
    fn find(dir: &Path, path: &[String], found: &mut Modules) {
        for entry in fs::read_dir(dir).unwrap() {
            let file = entry.unwrap().path();
            let stem = file.file_stem().unwrap().to_str().unwrap().to_owned();
            let is_rust = file.extension().is_some_and(|extension| extension == "rs");
            if file.is_dir() && !file.join("Cargo.toml").exists() {
                find(&file, &[path, &[stem]].concat(), found);
            } else if is_rust && ["mod", "lib", "main"].contains(&&*stem) {
                found.insert(path.to_owned(), file);
            } else if is_rust {
                found.insert([path, &[stem]].concat(), file);
            }
        }
    }
    let mut found = Modules::new();
    find(root, &[], &mut found);
    found
}

/// Collects the paths in a file's code.
#[derive(Default)]
struct Paths(Vec<Vec<String>>);

impl Paths {
    fn follow(&mut self, before: &[String], tree: &syn::UseTree) {
        match tree {
            syn::UseTree::Path(path) => {
                self.follow(&[before, &[path.ident.to_string()]].concat(), &path.tree);
            }
            syn::UseTree::Group(group) => group.items.iter().for_each(|tree| self.follow(before, tree)),
            syn::UseTree::Name(name) => self.0.push([before, &[name.ident.to_string()]].concat()),
            syn::UseTree::Rename(rename) => self.0.push([before, &[rename.ident.to_string()]].concat()),
            syn::UseTree::Glob(_) => self.0.push(before.to_owned()),
        }
    }
}

impl Visit<'_> for Paths {
    fn visit_item_use(&mut self, item: &syn::ItemUse) {
        self.follow(&[], &item.tree);
    }

    fn visit_path(&mut self, path: &syn::Path) {
        self.0
            .push(path.segments.iter().map(|part| part.ident.to_string()).collect());
        syn::visit::visit_path(self, path);
    }

    /// `pub(super)` imports nothing.
    fn visit_visibility(&mut self, _: &syn::Visibility) {}

    fn visit_item_mod(&mut self, module: &syn::ItemMod) {
        let is_test = module.attrs.iter().any(|attribute| {
            attribute
                .parse_args::<syn::Path>()
                .is_ok_and(|path| path.is_ident("test"))
        });
        if !is_test {
            syn::visit::visit_item_mod(self, module);
        }
    }
}

/// The module that `path`, as the module `of` names it, leads into.
fn module<'m>(
    path: &[String],
    of: &[String],
    modules: &'m Modules,
) -> Option<(&'m Vec<String>, &'m PathBuf)> {
    let mut base = match &**path.first()? {
        "crate" => Vec::new(),
        "self" | "super" => of.to_owned(),
        _ => return None,
    };
    for part in path {
        match &**part {
            "crate" | "self" => {}
            "super" => drop(base.pop()),
            part => base.push(part.to_owned()),
        }
    }
    (0..=base.len())
        .rev()
        .find_map(|len| modules.get_key_value(&base[..len]))
}

fn imports(root: &Path) -> Imports {
    let modules = modules(root);
    let imports = modules.iter().map(|(of, file)| {
        let mut paths = Paths::default();
        paths.visit_file(&syn::parse_file(&fs::read_to_string(file).unwrap()).unwrap());
        let named = paths.0.iter().filter_map(|path| module(path, of, &modules));
        let others = named.filter(|(other, _)| !other.starts_with(of));
        (file.clone(), others.map(|(_, file)| file.clone()).collect())
    });
    imports.collect()
}

/// All files that `from` imports, and what those import, and so on.
fn reach<'i>(imports: &'i Imports, from: &'i PathBuf) -> BTreeSet<&'i PathBuf> {
    let mut reached = BTreeSet::new();
    let mut left: Vec<_> = imports[from].iter().collect();
    while let Some(file) = left.pop() {
        if reached.insert(file) {
            left.extend(&imports[file]);
        }
    }
    reached
}

/// The files that reach themselves, those that reach each other together.
fn circles(imports: &Imports) -> BTreeSet<BTreeSet<&PathBuf>> {
    let reached: BTreeMap<_, _> = imports.keys().map(|file| (file, reach(imports, file))).collect();
    let own = reached.iter().filter(|(file, others)| others.contains(*file));
    own.map(|(file, others)| {
        others
            .iter()
            .filter(|other| reached[**other].contains(file))
            .copied()
            .collect()
    })
    .collect()
}

#[test]
fn files_import_each_other_without_a_circle() {
    let repository = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut found = BTreeSet::new();
    for package in packages(repository) {
        let imports = imports(&package);
        assert!(
            imports.values().any(|others| !others.is_empty()),
            "{}",
            package.display()
        );
        for circle in circles(&imports) {
            let names = circle
                .iter()
                .map(|file| file.strip_prefix(repository).unwrap().to_str().unwrap());
            found.insert(names.map(str::to_owned).collect::<Vec<_>>());
        }
    }
    assert!(
        found.is_empty(),
        "files that import each other in a circle: {found:#?}"
    );
}

#[test]
fn a_circle_is_found_through_other_files_and_a_straight_line_is_none() {
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, code: &str| {
        let file = dir.path().join(name);
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        fs::write(file, code).unwrap();
    };
    write("lib.rs", "mod a; mod b; mod c; mod d;");
    write("a.rs", "use crate::b::{self, B};");
    write(
        "b/mod.rs",
        "mod part; pub use part::Part; pub struct B(crate::c::C);",
    );
    write("b/part.rs", "use super::B; pub struct Part(B);");
    write(
        "c.rs",
        "pub struct C; #[cfg(test)] mod tests { use crate::a::A; }",
    );
    write("d.rs", "fn f() { crate::a::f(); }");
    let straight = imports(dir.path());
    assert_eq!(circles(&straight), BTreeSet::new());
    write("c.rs", "pub struct C; fn f() { super::a::f(); }");
    let bent = imports(dir.path());
    let found = circles(&bent);
    let names: Vec<Vec<_>> = found
        .iter()
        .map(|circle| {
            circle
                .iter()
                .map(|file| file.strip_prefix(dir.path()).unwrap().to_str().unwrap())
                .collect()
        })
        .collect();
    assert_eq!(names, [["a.rs", "b/mod.rs", "c.rs"]]);
}
