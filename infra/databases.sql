-- Prefect, MLflow and MLflow's users each keep their own migration table: one database each.
CREATE DATABASE prefect;
CREATE DATABASE mlflow;
CREATE DATABASE mlflow_auth;
