//! The schemas in `schemas/` are those of the code.

use std::path::Path;

#[test]
fn schemas_are_not_stale() {
    for (name, schema) in prefold::cli::schemas() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("schemas").join(name);
        let found: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        assert!(found == schema.to_value(), "{name} is stale: run `cargo run -- schema`");
    }
}

#[test]
fn adapter_configs_are_what_their_schema_says() {
    let (_, schema) = prefold::cli::schemas().into_iter().find(|(name, _)| name.starts_with("adapter_config")).unwrap();
    let validator = jsonschema::validator_for(schema.as_value()).unwrap();
    let minimal = serde_json::json!({"method": "prefix_plus", "num_layers": 2, "num_heads": 4, "head_dim": 16});
    assert!(validator.is_valid(&minimal));
    for field in ["method", "num_layers", "num_heads", "head_dim"] {
        let mut lacking = minimal.clone();
        lacking.as_object_mut().unwrap().remove(field);
        assert!(!validator.is_valid(&lacking), "{field} is required");
    }
}
