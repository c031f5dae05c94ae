-- Prefect and MLflow each keep their own migration table: one database each.
CREATE DATABASE prefect;
CREATE DATABASE mlflow;
